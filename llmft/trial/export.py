"""What a trial has trained, in the forms that other programs read: peft's for an adapter, transformers' for a whole model."""

from __future__ import annotations

from pathlib import Path

import torch

from llmft.config import ModelRef, TrialSpec
from llmft.errors import UserError
from llmft.methods import build_method
from llmft.methods.modules import merge
from llmft.models import borrow_model, load_tokenizer, resolve_model
from llmft.trial.weights import put_back


def export_adapter(spec: TrialSpec, weights: bytes, folder: Path) -> None:
    """Write a trained adapter as `peft.PeftModel.from_pretrained(base, folder)` reads it, beside others of the same base if one likes.

    Args:
        spec: of the trial.
        weights: the contents of its `weights.safetensors`.
        folder: is made; it must not be there, or be empty.

    Raises:
        UserError: the method is none of peft's, the base model is not there or has changed, or the folder is not empty.
    """
    from safetensors.torch import save_file

    _check_empty(folder)
    ref, method = _base_of(spec), build_method(spec.method, spec.settings)
    with borrow_model(ref, "fp32", torch.device("cpu")) as model:
        put_back(spec, method, model, weights, where="export")
        adapter = method.export(model)
        if adapter is None:
            raise UserError(f"export: method '{spec.method}' has no form in peft. --merge writes a whole model, if it adds nothing.")
        config, state = adapter
        config.base_model_name_or_path = ref.path or ref.name
        config.revision = None if ref.path else ref.revision
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")


def export_model(spec: TrialSpec, weights: bytes, folder: Path) -> None:
    """Write the whole adapted model with its tokenizer, as transformers reads it; the arguments are those of `export_adapter`.

    An adapter of peft's is merged into the base.

    Raises:
        UserError: as `export_adapter`; or the method adds parts that no model of transformers has, or cannot be merged.
    """
    _check_empty(folder)
    method = build_method(spec.method, spec.settings)
    if method.base_weights != "fp32":
        raise UserError(
            f"export: method '{spec.method}' trains beside a base in 4 bits; merged into the full base it would be another model. "
            "Leave out --merge: the adapter is exported by itself."
        )
    ref = _base_of(spec)
    with borrow_model(ref, "fp32", torch.device("cpu")) as model:
        network, names = model.network, set(model.network.state_dict())
        put_back(spec, method, model, weights, where="export")
        merge(network)
        if added := sorted(network.state_dict().keys() - names):
            instead = (
                "llmft.trial.weights.restored gives the adapted model."
                if method.export(model) is None
                else "Leave out --merge: peft loads them beside the base."
            )
            raise UserError(
                f"export: method '{spec.method}' adds parts that no model of transformers has ({', '.join(added[:3])} ...). {instead}"
            )
        network.save_pretrained(folder, state_dict=_whole_state(network))
        load_tokenizer(ref).save_pretrained(folder)


def _whole_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor by name. Where the configuration ties none, what is one tensor under several names is written under each: of an
    encoder-decoder model with an untied head, the input embeddings of both parts."""
    state = network.state_dict()
    if getattr(network.config, "tie_word_embeddings", False):
        return state
    names: dict[int, str] = {}
    return {name: tensor if names.setdefault(tensor.data_ptr(), name) == name else tensor.clone() for name, tensor in state.items()}


def _base_of(spec: TrialSpec) -> ModelRef:
    """Find the trial's base model on this machine.

    Raises:
        UserError: it is not there, or has other contents than it had.
    """
    ref = spec.model
    if ref.path is None:
        return ref
    local = resolve_model("toy" if ref.name == "toy" else ref.path)
    if local.fingerprint != ref.fingerprint:
        raise UserError(f"export: the base model in {ref.path} is not the one that was adapted; it has changed since.")
    return local


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export: {folder} is there already. Name a folder that is not, or is empty.")
