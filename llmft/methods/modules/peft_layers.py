"""Layers of peft: inserted into a network in place, merged into its weights, and exported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmft.models import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import PeftConfig
    from transformers import PreTrainedModel


def insert_peft_layers(config: PeftConfig, network: PreTrainedModel, generator: torch.Generator) -> None:
    """Insert peft's layers into `network`, in fp32, and leave `requires_grad` on their parameters alone.

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
            parameter.data = parameter.data.float()  # beside a quantized layer peft makes them half
            parameter.requires_grad_(True)


def peft_layers_of(network: PreTrainedModel) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Return the configuration and the weights of the inserted layers, for `Method.export`."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    config: Any = network.peft_config["default"]
    return config, {f"base_model.model.{name}": tensor for name, tensor in state.items()}


def inserted_layers(network: PreTrainedModel) -> dict[str, Any]:
    """Find the inserted layers by their names in `network`; none, and no import of peft, where nothing was inserted."""
    if not hasattr(network, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def merge(network: PreTrainedModel) -> None:
    """Merge the inserted layers into the weights of `network`, in place."""
    for name, layer in inserted_layers(network).items():
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())


def merged_deltas(network: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield by how much `merge` would change each weight, one new tensor at a time; every process that holds a shard must call this."""
    for layer in inserted_layers(network).values():
        (adapter,), base = layer.active_adapters, layer.get_base_layer()
        transposed = getattr(layer, "fan_in_fan_out", False)  # [in, out] in place of [out, in]
        if hasattr(layer, "ia3_l"):
            by = whole(layer.ia3_l[adapter]) - 1  # [1, in] where the input is scaled, [out, 1] where the output
            yield whole(base.weight) * (by.T if transposed else by)
            if not layer.is_feedforward and base.bias is not None:
                yield whole(base.bias) * by[:, 0]
            continue
        added = whole(layer.get_delta_weight(adapter))
        if adapter in layer.lora_variant:  # DoRA
            from peft.utils.integrations import dequantize_module_weight

            weight = whole(dequantize_module_weight(base))
            length = (weight + added).norm(dim=0 if transposed else 1, keepdim=True)
            learned = whole(layer.lora_magnitude_vector[adapter].weight).view_as(length)
            added = (weight + added) * learned / length - weight
        yield added


def task_type(network: PreTrainedModel) -> str:
    """Return peft's name for what `network` does."""
    return "SEQ_2_SEQ_LM" if network.config.is_encoder_decoder else "CAUSAL_LM"


def linear_layers(network: PreTrainedModel) -> list[str]:
    """Return the last parts of the names of all layers that multiply by a matrix."""
    kinds = ("Linear", "Conv1D", "Linear4bit")
    return sorted({name.split(".")[-1] for name, module in network.named_modules() if type(module).__name__ in kinds})
