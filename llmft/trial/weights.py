"""What a trial trained, as safetensors: every trained parameter of the network by its name, a new head's included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmft.config import TrialSpec
from llmft.errors import UserError
from llmft.methods import Method, build_method
from llmft.models import AdaptedModel, LoadedModel, borrow_model, whole
from llmft.runtime import Runtime
from llmft.seeds import derive
from llmft.tasks import load_task


@contextmanager
def restored(spec: TrialSpec, path: Path | str | None, device: torch.device) -> Iterator[AdaptedModel]:
    """Restore a trial's model as it was after the trial, on its device, for evaluation.

    Args:
        path: its `weights.safetensors`; None where its method trains nothing.

    Raises:
        UserError: as `put_back`, the file is not there, or the base model cannot be loaded.
    """
    method = build_method(spec.method, spec.settings)
    dropout = spec.train.dropout if method.trains else None
    content = _read(path) if method.trains and path else b""
    with borrow_model(spec.model, spec.precision, device, dropout, base_weights=method.base_weights) as model:
        yield put_back(spec, method, model, content, where=f"weights: {path}").to(device).eval()


def put_back(spec: TrialSpec, method: Method, model: LoadedModel, content: bytes, where: str) -> AdaptedModel:
    """Make of a trial's base model what it was after the trial, with its `method`.

    Args:
        content: of its `weights.safetensors`.
        where: opens an error.

    Raises:
        UserError: these are no weights, or others than the method trains.
    """
    adapted = AdaptedModel(method, model)
    if method.trains:
        n_labels = len(load_task(spec.task, spec.definition).labels)
        method.prepare(model, n_labels, torch.Generator().manual_seed(derive(spec.init_seed, "init")))
        method.finalize(adapted)
        put_weights(model, content, where)
    return adapted


def gather_weights(model: LoadedModel, runtime: Runtime) -> bytes | None:
    """Gather the trained parameters as a safetensors file's bytes; None in every process but the first, though all must call this."""
    from safetensors.torch import save

    kept = {}
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            gathered = whole(parameter)  # one at a time: a device need not hold them all
            if runtime.rank == 0:
                kept[name] = gathered.cpu().contiguous()
    return save(kept) if runtime.rank == 0 else None


def _read(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"weights: cannot read {path} ({error}). A trial keeps its weights where it is asked to.") from None


@torch.no_grad()
def put_weights(model: LoadedModel, content: bytes, where: str) -> None:
    """Put the contents of a trial's `weights.safetensors` into a model that the trial's method has prepared (and finalized).

    Raises:
        UserError: these are no weights, or others than the method trains; the line begins with `where`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        kept = load(content)
    except SafetensorError as error:
        raise UserError(f"{where}: these are no weights ({error}).") from None
    trained = {name: parameter for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    shapes, expected = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (kept, trained))
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise UserError(
            f"{where}: kept weights and the prepared model differ in {len(wrong)} parameters ({', '.join(wrong[:3])} ...). "
            "Prepare the trial's own model with the trial's own method and settings."
        )
    for name, parameter in trained.items():
        parameter.copy_(kept[name])
