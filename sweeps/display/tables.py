"""Tables for the terminal: a plan before it runs, one trial's record, the methods and the tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmft.methods import SearchRange
from llmft.records import Change, Teacher, TrialRecord
from sweeps.search import CellState, PlannedTrial, Records, failed

if TYPE_CHECKING:
    from sweeps.resources import Memory, Placement, PlanPreview


def _table(*columns: str, n_left: int = 1) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < n_left else "right", overflow="fold")
    return table


def plan_table(states: Iterable[CellState]) -> Table:
    """One row a cell: its trials by stage, new, done and failed."""
    table = _table("model", "task", "method", "shots", "pattern", "searched", "search", "report", "done", "failed", "new", n_left=3)
    for state in states:
        cell = state.cell
        table.add_row(
            cell.base.model.name, cell.base.task, cell.entry, str(cell.base.n_shots), cell.base.pattern,
            ", ".join(cell.ranges) or "-", str(state.n_search), str(state.n_report) if not state.failed else "search failed",
            str(state.n_done - state.n_failed), str(state.n_failed), str(state.total - state.n_done),
        )  # fmt: skip
    return table


def count_by_stage(states: Iterable[CellState], records: Records) -> dict[str, tuple[int, int, int]]:
    """stage -> (new, done, failed) trials."""
    totals, states = {}, list(states)
    still_open = {trial.digest for state in states for trial in state.open}
    for stage, expected in (("search", sum(s.n_search for s in states)), ("report", sum(s.n_report for s in states))):
        trials: list[PlannedTrial] = [trial for state in states for trial in getattr(state, stage)]
        ended = [records[trial.digest] for trial in trials if trial.digest not in still_open]
        n_failed = sum(map(failed, ended))
        totals[stage] = expected - len(ended), len(ended) - n_failed, n_failed
    return totals


def preview_view(outlook: PlanPreview) -> RenderableType:
    """What each kind of trial gets and needs, what does not fit, and what the rest of the plan will take."""
    table = _table("model", "task", "method", "gets", "memory", "weights", "gradients", "optimiser", "activations", "host", n_left=4)
    notes = []
    for need in outlook.needs:
        placement, name = need.placement, f"{need.model} {need.task} {need.method}"
        sizes = _sizes(placement) if placement.memory else ["?"]
        table.add_row(need.model, need.task, need.method, str(placement.slot), *sizes)
        if placement.unknown:
            notes.append(Text(f"memory unknown: {name}: {placement.unknown}", style="dim"))
        if placement.work is not None and placement.work.same_shots:
            text = f"every seed draws the same examples: {name}: {max(need.shots)} shots are all that the training pool holds"
            notes.append(
                Text(f"{text}, so that the spread over seeds leaves their choice out. Use fewer, or a larger pool.", style="yellow")
            )
        if placement.problem:
            notes.append(Text(f"does not fit: {name}: {placement.problem}", style="yellow"))
    return Group(Text(f"on {outlook.machine}", style="bold"), table, *notes, *map(Text, _assumptions(outlook)))


def _sizes(placement: Placement) -> list[str]:
    """For each process: all of what limits it (its GPU's memory, or the host's), the parts, and the host's where there is a GPU."""
    memory = placement.memory
    in_training = bool(memory.n_trainable) and not _scoring_is_worst(memory)
    parts = [
        memory.weight_bytes + memory.gathered_bytes, memory.gradient_bytes if in_training else 0, memory.optimizer_bytes,
        memory.training_bytes if in_training else memory.scoring_bytes,
    ]  # fmt: skip
    total, host = memory.device_bytes, memory.host_bytes
    if not placement.slot.gpus:
        total, host = memory.cpu_bytes, memory.cpu_bytes - sum(parts)
    return [size_text(size) if size else "-" for size in (total, *parts, host)]


def _scoring_is_worst(memory: Memory) -> bool:
    return memory.scoring_bytes > memory.gradient_bytes + memory.training_bytes


def _assumptions(outlook: PlanPreview) -> list[str]:
    from sweeps.display.live_table import duration
    from sweeps.resources import CPU_HEADROOM, CUDA_CONTEXT_BYTES, GIB, GPU_HEADROOM, GPU_TYPES, PROCESS_BYTES, UTILISATION

    on_gpu = any(need.placement.slot.gpus for need in outlook.needs)
    headroom = (
        f"{GPU_HEADROOM - 1:.0%} head-room and {CUDA_CONTEXT_BYTES / GIB:g} GiB for the GPU's context"
        if on_gpu
        else f"{CPU_HEADROOM - 1:.0%} head-room"
    )
    memories = [need.placement.memory for need in outlook.needs if need.placement.memory]
    held = ["the base model", "the best weights on dev"]
    held += ["what a teacher has said"] if any(memory.taught_bytes for memory in memories) else []
    held_text = ", ".join(held[:-1]) + f" and {held[-1]}"
    lines = [f'memory: of each process, with the longest batch of the longest draw; "host" holds {held_text}']
    if any(memory.n_trainable and _scoring_is_worst(memory) for memory in memories):
        lines.append('gradients: "-" where scoring takes the most memory; those of training are not there then')
    lines += [
        f"assumed on top: {headroom}, and {PROCESS_BYTES / GIB:g} GiB of the host's memory for the process; nothing else runs here",
    ]
    time, disk = outlook.time, outlook.disk
    if time is None:
        lines.append("time: unknown until the first trials end")
    else:
        node = outlook.machine.gpu_node
        source = "from trials that have ended"
        if time.source == "arithmetic":
            gpu = GPU_TYPES[node.gpu_type]
            source = f"assuming {UTILISATION:.0%} of the peak of {node.gpu_type}, {gpu.fp32_tflops:g} TFLOP/s in fp32, {gpu.half_tflops:g} in half"
        devices = f"{time.device_s / 3600:.3g} {'GPU' if time.on_gpu else 'CPU'}-hours"
        lines.append(f"time: about {duration(time.wall_s)} ({devices}), {source}")
    kept = f"; {size_text(disk.weights_bytes)} more if trained weights are kept" if disk.weights_bytes else ""
    return [*lines, f"disk: about {size_text(disk.results_bytes)} of records and predictions{kept}"]


def size_text(n_bytes: float) -> str:
    """512 B, 34 MiB, 1.2 GiB."""
    size, units = float(n_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"


def changes_table(changes: Iterable[Change]) -> Table:
    """What else a model could do before and can after."""
    table = _table("source", "name", "metric", "before", "after", "± (se)", "n", n_left=3)
    for change in changes:
        before, after = change.before, change.after
        table.add_row(
            after.source, after.name, after.metric, "" if before is None else f"{before.value:.4g}", f"{after.value:.4g}",
            "" if after.stderr is None else f"{after.stderr:.2g}", "" if after.n is None else str(after.n),
        )  # fmt: skip
    return table


def record_summary(record: TrialRecord) -> RenderableType:
    """One trial: its numbers by checkpoint and set, its findings and its cost."""
    spec, parts = record.spec, []
    parts.append(
        Text(
            f"{spec.model.name} on {spec.task} with {spec.method}, {spec.n_shots} shots, seed {spec.data_seed} ({record.digest})",
            style="bold",
        )
    )
    if not record.finished:
        parts.append(Text(f"failed, {record.cause}: {record.message}", style="red"))
        return Group(*parts)
    parts.append(_numbers_table(record))
    if taught := record.teacher:
        said = "" if taught.dev_score is None else f": {taught.dev_score:.1%} on dev, {taught.zero_shot_dev_score:.1%} from the query alone"
        parts.append(Text(f"teacher {taught.model}, {len(taught.demonstrations)} demonstrations{said}{_rounds_text(taught)}"))
    if record.mixture:
        mixed = ", ".join(f"{part.task} {part.n} ({part.rate:.1%})" for part in record.mixture)
        parts.append(Text(f"trained on {mixed}"))
    if record.forgetting:
        parts.append(changes_table(record.forgetting))
    parts += _findings(record)
    if record.content_free:
        shares = ", ".join(f"{label} {share:.3f}" for label, share in record.content_free.items())
        parts.append(Text(f"calibrated by what the prompt alone makes the model say: {shares}"))
    if record.virtual_tokens:
        parts.append(_virtual_tokens_table(record))
    if any(record.weight_distance.values()):
        moved = ", ".join(f"{selection} {distance:.3g}" for selection, distance in record.weight_distance.items())
        parts.append(Text(f"the base's weights have moved by (L2): {moved}"))
    if record.cost:
        cost = record.cost
        parts.append(
            Text(
                f"{cost.wall_s:.1f} s on {cost.device}, peak {cost.peak_memory_bytes / 2**20:.0f} MiB, "
                f"{cost.n_trainable_parameters:,} of {cost.n_parameters:,} parameters trained, {cost.tokens_per_query:.0f} tokens a query"
            )
        )
    return Group(*parts)


def _rounds_text(teacher: Teacher) -> str:
    """What there is to say of a teacher's rounds: of several, how good it was in each; how much of its answers was trusted."""
    text = ""
    if len(teacher.rounds) > 1 and teacher.dev_score is not None:
        text += "; round by round " + ", ".join(f"{each.dev_score:.1%}" for each in teacher.rounds)
    if any(each.n_trusted < each.n_asked for each in teacher.rounds):
        text += "; trusted " + ", ".join(f"{each.n_trusted} of {each.n_asked} answers" for each in teacher.rounds)
    return text


def _findings(record: TrialRecord) -> list[Text]:
    """Each finding once, with the checkpoints that it holds for."""
    selections: dict[tuple[str, str, str | None, str], list[str]] = {}
    for finding in record.findings:
        of = selections.setdefault((finding.severity, finding.code, finding.set, finding.message), [])
        of += [finding.selection] if finding.selection else []
    lines = []
    for (severity, code, name, message), of in selections.items():
        where = f" [{', '.join([name, *of])}]" if name else ""
        lines.append(Text(f"{severity}: {code}{where}: {message}", style="yellow" if severity != "note" else "dim"))
    return lines


PERCENT, PLAIN = {"majority_share": "majority", "bleu": "BLEU"}, {"macro_f1": "macro-F1", "mcc": "MCC"}
BESIDE = {
    "classification": ("majority_share", "macro_f1", "mcc"),
    "generation": ("rouge1", "rouge2", "rougeL", "bleu", "exact_match", "token_f1"),
}
"""What a trial's table shows beside the score, and how it is called there."""


def _numbers_table(record: TrialRecord) -> Table:
    """The score of every set under every selection, and what goes with it."""
    sets = [(selection, name, numbers) for selection, sets in record.metrics.items() for name, numbers in sets.items()]
    kind = "generation" if record.spec.generation else "classification"
    metric = next((numbers.metric for _, _, numbers in sets), "score")
    beside = [name for name in BESIDE[kind] if name != metric]
    titles = [PLAIN.get(name) or f"{PERCENT.get(name, name)} %" for name in beside]
    table = _table("checkpoint", "set", f"{metric} %", *titles, "rows", n_left=2)
    for selection, score in record.dev_score.items():
        table.add_row(selection, "dev", f"{100 * score:.1f}", *[""] * len(beside), str(len(record.draws.dev)))
    for selection, name, numbers in sets:
        domain = "" if numbers.domain == "in" else " (OOD)"
        values = ((key, getattr(numbers, key)) for key in beside)
        texts = [f"{value:.3f}" if key in PLAIN else f"{100 * value:.1f}" for key, value in values]
        table.add_row(selection, name + domain, f"{100 * numbers.score:.1f}", *texts, str(numbers.n))
    return table


def _virtual_tokens_table(record: TrialRecord) -> RenderableType:
    table = _table("virtual token", "nearest words by cosine", "nearest words by distance", "norm", n_left=3)
    for place, token in enumerate(record.virtual_tokens):
        near = (" ".join(f"{word!r} {value:.2f}" for word, value in words.items()) for words in (token.cosine, token.distance))
        table.add_row(str(place), *near, f"{token.norm:.2f}")
    return table


def range_text(span: SearchRange) -> str:
    """Write a range as `1e-05 to 0.01, log` or `one of 4, 8`."""
    if span.choices:
        return f"one of {', '.join(map(str, span.choices))}"
    return f"{span.low:g} to {span.high:g}{', log' if span.log else ''}{', whole numbers' if span.integer else ''}"
