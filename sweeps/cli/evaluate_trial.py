"""Evaluation of a trial's kept model on other tasks, after the sweep; the numbers are written beside the trial's record."""

from __future__ import annotations

import hashlib
import tempfile
from importlib.metadata import version
from pathlib import Path

from llmft.config import ForgettingSpec
from llmft.errors import UserError
from llmft.methods import build_method
from llmft.records import (
    EVALUATION_FILE,
    WEIGHTS_FILE,
    Change,
    Evaluation,
    RecordError,
    StoragePath,
    TrialRecord,
    read_evaluation,
    reason,
    write_atomically,
)
from sweeps.planning import ForgettingPlan
from sweeps.store import Store


def evaluate_trial(
    root: StoragePath | str,
    digest: str,
    wanted: ForgettingPlan,
    *,
    before: bool = False,
    data_dir: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """Measure what `wanted` names, and add the numbers to the trial's `evaluation.json`.

    Args:
        root: the folder of results, or its URL.
        digest: the trial's, or the beginning of it.
        wanted: what is measured.
        before: whether to measure the base model as well.
        data_dir: a local folder with the tasks' files.
        device: where to run; None takes the default device.

    Raises:
        UserError: there is no such finished trial, its weights were not kept, its method has no language-model head, or something
            that is to be measured is not there.
    """
    from llmft.trial import check_forgetting, packages, resolve_forgetting

    if not (wanted.tasks or wanted.harness or wanted.text):
        raise UserError("evaluate: nothing to measure. Name --harness, --tasks or --text.")
    store = Store(root)
    record = _finished_record(store, digest)
    forgetting = resolve_forgetting(**dict(wanted), data_dir=data_dir)
    check_forgetting(record.spec.model_copy(update={"forgetting": forgetting}))
    folder = store.folder(record.digest)
    changes = _measure(folder, record, forgetting, before, device)
    evaluation = Evaluation(
        digest=record.digest, changes=_merge_changes(folder, changes), limit=wanted.limit, weights_sha256=record.weights_sha256,
        packages=packages() | ({"lm_eval": version("lm_eval")} if wanted.harness else {}),
    )  # fmt: skip
    try:
        write_atomically(folder / EVALUATION_FILE, evaluation.model_dump_json(indent=1).encode())
    except OSError as error:
        raise UserError(f"{folder}: {EVALUATION_FILE} cannot be written ({reason(error)}).") from None
    return evaluation


def _finished_record(store: Store, beginning: str) -> TrialRecord:
    """Read the record of a finished trial whose method keeps the language model's head."""
    digest = store.find(beginning)
    record = store.get(digest)
    if record is None or not record.finished:
        raise UserError(f"{store.root}: the trial {digest} has not finished{f' ({record.cause})' if record else ''}.")
    if build_method(record.spec.method, record.spec.settings).has_own_head:
        raise UserError(
            f"evaluate: the method {record.spec.method!r} answers with a head of its own and has no words for other tasks. "
            "Choose a trial of a method that keeps the language model's head."
        )
    return record


def _measure(folder: StoragePath, record: TrialRecord, forgetting: ForgettingSpec, before: bool, device: str | None) -> list[Change]:
    """Measure the adapted model and, with `before`, the base model."""
    from llmft.runtime import Runtime, choose_device
    from llmft.trial import measure, measure_base, pair, restored

    spec, where, runtime = record.spec, choose_device(device), Runtime(device=device)
    with tempfile.TemporaryDirectory() as scratch:
        path = _copy_weights(folder, record, Path(scratch)) if build_method(spec.method, spec.settings).trains else None
        with restored(spec, path, where) as adapted:
            after = measure(adapted, spec.model, forgetting, runtime, progress=True)
        del adapted  # the base model needs its memory
    return pair(measure_base(spec, forgetting, runtime, where) if before else [], after)


def _copy_weights(folder: StoragePath, record: TrialRecord, scratch: Path) -> Path:
    """Copy the trial's weights to a local file, and check them against the record."""
    if record.weights_sha256 is None:
        raise UserError(
            f"{folder}: this trial's weights were not kept. Put keep_weights: true into the plan, remove the trial's folder and give "
            "the sweep's command again (of the trials, only those that are reported keep them)."
        )
    try:
        content = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise UserError(f"{folder}: {WEIGHTS_FILE} cannot be read ({reason(error)}).") from None
    if hashlib.sha256(content).hexdigest() != record.weights_sha256:
        raise UserError(f"{folder}: {WEIGHTS_FILE} is not what the record says (checksum); remove the folder and run the plan again.")
    path = scratch / WEIGHTS_FILE
    path.write_bytes(content)
    return path


def _merge_changes(folder: StoragePath, changes: list[Change]) -> list[Change]:
    """Return the numbers of earlier evaluations and `changes`, which replace those that they measure again."""
    try:
        earlier = read_evaluation(folder)
    except (RecordError, OSError) as error:
        raise UserError(str(error)) from None
    return list({change.after.key: change for change in [*(earlier.changes if earlier else ()), *changes]}.values())
