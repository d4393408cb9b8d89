"""Which trials a sweep executed."""

from pathlib import Path


def executed(log) -> list[str]:
    return [line.split()[0] for line in Path(log).read_text().splitlines()] if Path(log).exists() else []
