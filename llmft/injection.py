"""Methods that peft has: their layers put into a network in place, by a generator of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftConfig


def inject(config: PeftConfig, network: torch.nn.Module, generator: torch.Generator) -> None:
    """Put peft's layers into `network`, in fp32, and leave `requires_grad` on their parameters alone.

    Args:
        generator: seeds whatever peft draws.

    Raises:
        ValueError: what peft raises where no layer has one of the names in `target_modules`, or one that it cannot adapt.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        known = {id(parameter) for parameter in network.parameters()}
        inject_adapter_in_model(config, network)
    network.requires_grad_(False)
    for parameter in network.parameters():
        if id(parameter) not in known:
            parameter.data = parameter.data.float()  # beside a quantised layer peft makes them half
            parameter.requires_grad_(True)


def injected(network: torch.nn.Module) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """What `inject` has put into `network`, for `Method.peft_adapter`."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    return network.peft_config["default"], {f"base_model.model.{name}": tensor for name, tensor in state.items()}


def merge(network: torch.nn.Module) -> None:
    """Work what `inject` has put into `network` into its weights, in place; what cannot be merged stays."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            network.set_submodule(name, layer.get_base_layer())


def task_type(network: torch.nn.Module) -> str:
    """peft's name for what `network` does."""
    return "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"


def linear_layers(network: torch.nn.Module) -> list[str]:
    """The last parts of the names of all layers that multiply by a matrix."""
    kinds = ("Linear", "Conv1D", "Linear4bit")
    return sorted({name.split(".")[-1] for name, module in network.named_modules() if type(module).__name__ in kinds})
