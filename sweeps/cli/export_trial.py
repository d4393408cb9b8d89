"""Export of a stored trial for peft and transformers."""

from __future__ import annotations

from pathlib import Path

from llmft.errors import UserError
from llmft.records import WEIGHTS_FILE, StoragePath
from sweeps.store import Store


def export_trial(root: StoragePath | str, beginning: str, folder: Path, merge: bool) -> str:
    """Write what one trial has trained into `folder` (`llmft.trial.export`), and return a line that says what lies there.

    Args:
        root: the folder of results, or its URL.
        beginning: of the trial's digest.
        folder: where to write; empty or not there.
        merge: whether to write the whole model, in place of the adapter alone.

    Raises:
        UserError: there is no such trial, it kept no weights, or it cannot be written so.
    """
    store = Store(root)
    digest = store.find(beginning)
    record = store.get(digest)
    if record is None:
        raise UserError(f"{store.root}: the trial {digest} has not finished.")
    if record.weights_sha256 is None:
        raise UserError(
            f"{store.root}: trial {record.digest} ({record.spec.method}) kept no weights. Run its plan with keep_weights: true into "
            "a new folder."
        )
    from llmft.trial import export_adapter, export_model

    weights = (store.folder(record.digest) / WEIGHTS_FILE).read_bytes()
    (export_model if merge else export_adapter)(record.spec, weights, folder)
    what = "a whole model: from_pretrained of transformers" if merge else "an adapter: peft.PeftModel.from_pretrained(base, ...)"
    return f"{folder} holds {what}; {record.spec.method} on {record.spec.task}, base {record.spec.model.name}"
