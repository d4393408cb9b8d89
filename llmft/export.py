"""What a trial has trained, in the forms that other programs read: peft's for an adapter, transformers' for a whole model."""

from __future__ import annotations

from pathlib import Path

import torch

from llmft.errors import UserError
from llmft.model import BorrowedModel, borrow_model, load_tokenizer, resolve_model
from llmft.registry import build_method, load_task
from llmft.spec import ModelRef, TrialSpec
from llmft.weights import put_weights


def export_adapter(spec: TrialSpec, weights: bytes, folder: Path) -> None:
    """Write a trained adapter as `peft.PeftModel.from_pretrained(base, folder)` reads it, beside others of the same base if one likes.

    Args:
        spec: of the trial.
        weights: the contents of its `weights.safetensors`.
        folder: is made; it must not be there, or be empty.

    Raises:
        UserError: the method is none of peft's, the base model is not there or has changed, or the folder is not empty.
    """
    _check_empty(folder)
    ref = _base_of(spec)
    with borrow_model(ref, "fp32", torch.device("cpu")) as model:
        adapted = _with_adapter(spec, model, weights, ref)
        if adapted is None:
            raise UserError(
                f"export: method '{spec.method}' has no form in peft. --merge writes a whole model, if it adds nothing."
            )
        adapted.save_pretrained(folder, save_embedding_layers=False)


def export_model(spec: TrialSpec, weights: bytes, folder: Path) -> None:
    """Write the whole adapted model with its tokenizer, as transformers reads it; the arguments are those of `export_adapter`.

    An adapter of peft's is merged into the base.

    Raises:
        UserError: as `export_adapter`; or the method adds parts that no model of transformers has, or cannot be merged.
    """
    _check_empty(folder)
    if build_method(spec.method, spec.settings).base_weights != "fp32":
        raise UserError(
            f"export: method '{spec.method}' trains beside a base in 4 bits; merged into the full base it would be another model. "
            "Leave out --merge: the adapter is exported by itself."
        )
    ref = _base_of(spec)
    with borrow_model(ref, "fp32", torch.device("cpu")) as model:
        names = set(model.network.state_dict())
        adapted = _with_adapter(spec, model, weights, ref)
        if adapted is None:
            _prepare(spec, model)
            put_weights(model, weights, where="export")
            network = model.network
        else:
            network = adapted.merge_and_unload()
        if added := sorted(network.state_dict().keys() - names):
            raise UserError(
                f"export: method '{spec.method}' adds parts that no model of transformers has ({', '.join(added[:3])} ...). "
                "Load them with llmft.weights.load_weights."
            )
        network.save_pretrained(folder)
        load_tokenizer(ref).save_pretrained(folder)


def _with_adapter(spec: TrialSpec, model: BorrowedModel, weights: bytes, ref: ModelRef):
    """peft's own model with the trial's weights; None where the method is none of peft's."""
    from peft import get_peft_model
    from safetensors.torch import load

    config = build_method(spec.method, spec.settings).peft_config(model.network)
    if config is None:
        return None
    config.base_model_name_or_path = ref.path or ref.name
    config.revision = None if ref.path else ref.revision
    adapted = get_peft_model(model.network, config)
    kept = {f"base_model.model.{name}": tensor for name, tensor in load(weights).items()}
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if kept.keys() != trained:
        raise UserError(f"export: the kept weights are not those of '{spec.method}' with its settings: {sorted(kept)[:3]} ...")
    adapted.load_state_dict(kept, strict=False)
    return adapted


def _prepare(spec: TrialSpec, model: BorrowedModel) -> None:
    n_labels = len(load_task(spec.task, spec.definition).labels)
    build_method(spec.method, spec.settings).prepare(model, n_labels, torch.Generator().manual_seed(0))


def _base_of(spec: TrialSpec) -> ModelRef:
    """The trial's base model as it lies here.

    Raises:
        UserError: it is not there, or has other contents than it had.
    """
    ref = spec.model
    if ref.path is None:
        return ref
    here = resolve_model("toy" if ref.name == "toy" else ref.path)
    if here.fingerprint != ref.fingerprint:
        raise UserError(f"export: the base model in {ref.path} is not the one that was adapted; it has changed since.")
    return here


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export: {folder} is there already. Name a folder that is not, or is empty.")
