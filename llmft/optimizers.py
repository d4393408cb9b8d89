"""The optimisers that `train.optimizer` names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llmft.errors import UserError
from llmft.quantised import check_bitsandbytes
from llmft.spec import TrainSpec


def build_optimizer(
    train: TrainSpec, parameters: Iterable[torch.nn.Parameter], factors: Mapping[torch.nn.Parameter, float]
) -> torch.optim.Optimizer:
    """The optimiser of a training.

    `adamw` is Loshchilov & Hutter 2019; `adamw_8bit` keeps its moments in 8 bits (Dettmers et al. 2022); `adafactor` (Shazeer &
    Stern 2018) is PyTorch's, with the learning rate as given and none of `beta1`, `beta2` and `epsilon`; `sgd` has `beta1` as its
    momentum.

    Args:
        factors: by what the learning rate of a parameter is multiplied; 1 where it is not there.

    Raises:
        UserError: the parameters are shards, and the optimiser needs whole ones.
    """
    parameters = list(parameters)
    if train.optimizer not in ("adamw", "sgd") and any(hasattr(parameter, "to_local") for parameter in parameters):
        raise UserError(
            f"train.optimizer: {train.optimizer} does not step on the shards of a model. Use adamw or sgd, or parallel: ddp."
        )
    by_factor: dict[float, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    groups = [{"params": group, "lr": train.learning_rate * factor} for factor, group in by_factor.items()]
    rate = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    adam = rate | {"betas": (train.beta1, train.beta2), "eps": train.epsilon}
    match train.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, **adam)
        case "adafactor":
            return torch.optim.Adafactor(groups, **rate)
        case "sgd":
            return torch.optim.SGD(groups, momentum=train.beta1, **rate)
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **adam)


def check_optimizer(train: TrainSpec, device: torch.device) -> None:
    """Raises:
    UserError: the optimiser cannot run on this device.
    """
    if train.optimizer == "adamw_8bit":
        check_bitsandbytes("train.optimizer: adamw_8bit")
        if device.type != "cuda":
            raise UserError(f"train.optimizer: adamw_8bit needs a CUDA device, and this is {device.type}. Use adamw.")


def state_bytes(train: TrainSpec, parameter: torch.Tensor) -> int:
    """What the optimiser keeps for a parameter in fp32."""
    n, shape = parameter.numel(), parameter.shape
    match train.optimizer:
        case "adamw":
            return 2 * 4 * n
        case "sgd":
            return 4 * n if train.beta1 else 0
        case "adafactor":  # of a matrix only the sums of its rows and columns
            return 4 * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])
        case "adamw_8bit":  # in blocks of 256 with a scale each; small tensors stay in fp32
            return 2 * (4 * n if n < 4096 else n + n // 64)
