"""Two sides of a comparison, measured in turn on the same machine: A B A B ..., and the median of the ratios."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Side:
    """Something that is run: `work` returns what it found, and is worth `times` of itself (a sample of a longer run)."""

    name: str
    work: Callable[[], object]
    times: float = 1.0
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    found: object = None

    def run(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.found = self.work()
        self.wall_s.append((time.perf_counter() - wall) * self.times)
        self.cpu_s.append((time.process_time() - cpu) * self.times)


class Timed(Side):
    """A side whose `work` times itself: it returns what it found, wall seconds and CPU seconds."""

    def run(self) -> None:
        self.found, wall, cpu = self.work()
        self.wall_s.append(wall * self.times)
        self.cpu_s.append(cpu * self.times)


def measure(ours: Side, others: list[Side], repeats: int, title: str, in_process: bool = True) -> None:
    """Run all sides in turn, `repeats` times, and print how much longer the others took than `ours`.

    Args:
        in_process: whether the work is done by this process, so that its CPU time says how long it took without neighbours.
    """
    for _ in range(repeats):
        for side in (ours, *others):
            side.run()
    table = Table(
        "side",
        "wall s",
        "CPU s",
        "ratio of wall",
        "its range",
        "ratio of CPU",
        title=f"{title} (load {os.getloadavg()[0]:.1f})",
    )
    for side in (ours, *others):
        ratios = [theirs / our for theirs, our in zip(side.wall_s, ours.wall_s, strict=True)]
        cpu = [theirs / our for theirs, our in zip(side.cpu_s, ours.cpu_s, strict=True)]
        table.add_row(
            side.name + (f" (x {side.times:.1f})" if side.times != 1 else ""),
            f"{statistics.median(side.wall_s):.2f}",
            f"{statistics.median(side.cpu_s):.2f}" if in_process else "",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{statistics.median(cpu):.2f}" if in_process else "",
        )
    Console(width=140).print(table)
