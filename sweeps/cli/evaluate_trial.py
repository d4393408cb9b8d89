"""What a kept trial's model can do beside its task, measured after the sweep and written beside the trial's record."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

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
from sweeps.store import Store


def evaluate_trial(
    root: StoragePath | str,
    digest: str,
    tasks: Sequence[str] = (),
    harness: Sequence[str] = (),
    harness_dir: str | None = None,
    text: str | None = None,
    limit: int | None = None,
    before: bool = False,
    data_dir: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """Measure, and add the numbers to the trial's `evaluation.json`.

    Args:
        root: the results.
        digest: the trial's, or the beginning of it.
        before: whether to measure the base model as well.
        tasks, harness, harness_dir, text, limit, data_dir: as for `llmft.trial.forgetting.resolve_forgetting`.

    Raises:
        UserError: there is no such finished trial, its weights were not kept, its method cannot be asked, or something that is
            to be measured is not there.
    """
    from llmft.runtime import Runtime, choose_device
    from llmft.trial import check_forgetting, measure, measure_base, packages, pair, resolve_forgetting, restored

    if not (tasks or harness or text):
        raise UserError("evaluate: nothing to measure. Name --harness, --tasks or --text.")
    store = Store(root)
    record = _finished(store, digest)
    spec = record.spec
    method = build_method(spec.method, spec.settings)
    if method.has_own_head:
        raise UserError(
            f"evaluate: the method {spec.method!r} answers with a head of its own and has no words for other tasks. "
            "Choose a trial of a method that keeps the language model's head."
        )
    wanted = resolve_forgetting(tasks, harness, harness_dir, text, limit, data_dir)
    check_forgetting(spec.model_copy(update={"forgetting": wanted}))
    folder, where, runtime = store.folder(record.digest), choose_device(device), Runtime(device=device)
    with tempfile.TemporaryDirectory() as scratch:
        path = _weights(folder, record, Path(scratch)) if method.trains else None
        with restored(spec, path, where) as adapted:
            after = measure(adapted, spec.model, wanted, runtime, progress=True)
        del adapted
    changes = pair(measure_base(spec, wanted, runtime, where) if before else [], after)
    evaluation = Evaluation(
        digest=record.digest,
        changes=_merged(folder, changes),
        limit=limit,
        weights_sha256=record.weights_sha256,
        packages=packages() | ({"lm_eval": version("lm_eval")} if harness else {}),
    )
    try:
        write_atomically(folder / EVALUATION_FILE, evaluation.model_dump_json(indent=1).encode())
    except OSError as error:
        raise UserError(f"{folder}: {EVALUATION_FILE} cannot be written ({reason(error)}).") from None
    return evaluation


def _finished(store: Store, digest: str) -> TrialRecord:
    found = store.find(digest)
    record = store.get(found)
    if record is None or not record.finished:
        raise UserError(f"{store.root}: the trial {found} has not finished{f' ({record.cause})' if record else ''}.")
    return record


def _weights(folder: StoragePath, record: TrialRecord, scratch: Path) -> Path:
    """The weights as a local file."""
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


def _merged(folder: StoragePath, changes: list[Change]) -> list[Change]:
    """The earlier numbers and these, which replace what they measure again."""
    try:
        earlier = read_evaluation(folder)
    except (RecordError, OSError) as error:
        raise UserError(str(error)) from None
    return list({change.after.key: change for change in [*(earlier.changes if earlier else ()), *changes]}.values())
