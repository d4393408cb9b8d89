"""One trial's record in the terminal: its numbers, its findings and its cost."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmft.records import Change, Teacher, TrialRecord
from sweeps.display.catalogue import terminal_table

TITLES = {"majority_share": "majority %", "bleu": "BLEU %", "macro_f1": "macro-F1", "mcc": "MCC"}
PLAIN = ("macro_f1", "mcc")
"""Metrics that are shown as they are; the others in percent."""
OTHER_METRICS = {
    "classification": ("majority_share", "macro_f1", "mcc"),
    "generation": ("rouge1", "rouge2", "rougeL", "bleu", "exact_match", "token_f1"),
}
"""What a trial's table shows besides the score."""


def record_summary(record: TrialRecord) -> RenderableType:
    """Return one trial's numbers by checkpoint and set, its findings and its cost."""
    spec = record.spec
    title = f"{spec.model.name} on {spec.task} with {spec.method}, {spec.n_shots} shots, seed {spec.data_seed} ({record.digest})"
    parts: list[RenderableType] = [Text(title, style="bold")]
    if not record.finished:
        return Group(*parts, Text(f"failed, {record.cause}: {record.message}", style="red"))
    parts.append(_numbers_table(record))
    if record.teacher:
        parts.append(Text(_teacher_text(record.teacher)))
    if record.mixture:
        parts.append(Text(f"trained on {', '.join(f'{part.task} {part.n} ({part.rate:.1%})' for part in record.mixture)}"))
    if record.forgetting:
        parts.append(changes_table(record.forgetting))
    parts += _finding_lines(record)
    if record.content_free:
        shares = ", ".join(f"{label} {share:.3f}" for label, share in record.content_free.items())
        parts.append(Text(f"calibrated by what the prompt alone makes the model say: {shares}"))
    if record.virtual_tokens:
        parts.append(_virtual_tokens_table(record))
    if any(record.weight_distance.values()):
        moved = ", ".join(f"{selection} {distance:.3g}" for selection, distance in record.weight_distance.items())
        parts.append(Text(f"the base's weights have moved by (L2): {moved}"))
    if cost := record.cost:
        parts.append(Text(
            f"{cost.wall_s:.1f} s on {cost.device}, peak {cost.peak_memory_bytes / 2**20:.0f} MiB, "
            f"{cost.n_trainable_parameters:,} of {cost.n_parameters:,} parameters trained, {cost.tokens_per_query:.0f} tokens a query"
        ))  # fmt: skip
    return Group(*parts)


def _numbers_table(record: TrialRecord) -> Table:
    """Return the score of every set under every selection, and the other metrics of its kind."""
    sets = [(selection, name, numbers) for selection, sets in record.metrics.items() for name, numbers in sets.items()]
    metric = next((numbers.metric for _, _, numbers in sets), "score")
    others = [name for name in OTHER_METRICS["generation" if record.spec.generation else "classification"] if name != metric]
    rows = [
        (selection, "dev", f"{100 * score:.1f}", *[""] * len(others), str(len(record.draws.dev) if record.draws else 0))
        for selection, score in record.dev_score.items()
    ]
    for selection, name, numbers in sets:
        values = ((key, getattr(numbers, key)) for key in others)
        texts = [f"{value:.3f}" if key in PLAIN else f"{100 * value:.1f}" for key, value in values]
        rows.append((selection, name + ("" if numbers.domain == "in" else " (OOD)"), f"{100 * numbers.score:.1f}", *texts, str(numbers.n)))
    return terminal_table(("checkpoint", "set", f"{metric} %", *(TITLES.get(name, f"{name} %") for name in others), "rows"), rows, n_left=2)


def _teacher_text(teacher: Teacher) -> str:
    """Say how good a teacher was, in each of its rounds where there are several, and how many of its answers were used."""
    text = f"teacher {teacher.model}, {len(teacher.demonstrations)} demonstrations"
    if teacher.dev_score is not None:
        text += f": {teacher.dev_score:.1%} on dev, {teacher.zero_shot_dev_score:.1%} from the query alone"
        if len(teacher.rounds) > 1:
            text += "; round by round " + ", ".join(f"{part.dev_score:.1%}" for part in teacher.rounds)
    if any(part.n_trusted < part.n_asked for part in teacher.rounds):
        text += "; trusted " + ", ".join(f"{part.n_trusted} of {part.n_asked} answers" for part in teacher.rounds)
    return text


def _finding_lines(record: TrialRecord) -> list[Text]:
    """Return each finding once, with the checkpoints that it holds for."""
    selections: dict[tuple[str, str, str | None, str], list[str]] = {}
    for finding in record.findings:
        names = selections.setdefault((finding.severity, finding.code, finding.set, finding.message), [])
        names += [finding.selection] if finding.selection else []
    lines = []
    for (severity, code, name, message), names in selections.items():
        where = f" [{', '.join([name, *names])}]" if name else ""
        lines.append(Text(f"{severity}: {code}{where}: {message}", style="yellow" if severity != "note" else "dim"))
    return lines


def _virtual_tokens_table(record: TrialRecord) -> Table:
    rows = []
    for position, token in enumerate(record.virtual_tokens):
        near = (" ".join(f"{word!r} {value:.2f}" for word, value in words.items()) for words in (token.cosine, token.distance))
        rows.append((str(position), *near, f"{token.norm:.2f}"))
    return terminal_table(("virtual token", "nearest words by cosine", "nearest words by distance", "norm"), rows, n_left=3)


def changes_table(changes: Iterable[Change]) -> Table:
    """Return what a model could do before it was adapted and can do after."""
    rows = []
    for change in changes:
        before, after = change.before, change.after
        rows.append((
            after.source, after.name, after.metric, "" if before is None else f"{before.value:.4g}", f"{after.value:.4g}",
            "" if after.stderr is None else f"{after.stderr:.2g}", "" if after.n is None else str(after.n),
        ))  # fmt: skip
    return terminal_table(("source", "name", "metric", "before", "after", "± (se)", "n"), rows, n_left=3)
