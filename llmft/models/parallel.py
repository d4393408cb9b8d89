"""One trial by several processes, one a device, with torch.distributed: DDP (a whole model on each) and FSDP2 (a part on each).

N processes give the predictions of one, up to rounding: the same batches, shared out; only the noise of dropout is another,
since every process draws its own. Each loads the whole model into its node's memory first, 4 bytes a parameter.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from llmft.errors import UserError
from llmft.models.adapted import AdaptedModel
from llmft.models.architectures import find_blocks
from llmft.models.loading import HALF
from llmft.runtime import Runtime

ShardingStrategy = Literal["ddp", "fsdp"]


def distributed_runtime(strategy: ShardingStrategy, device: str, **settings: Any) -> Runtime:
    """The runtime of this process, one of an initialised `torch.distributed` group.

    Args:
        strategy: "ddp" where the model fits on one device, "fsdp" where only its parts do.
        device: this process's device, e.g. "cuda:0" or "cpu"; the group's backend must serve it.
        settings: further fields of `Runtime`.
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    return Runtime(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        wrap={"ddp": _replicate, "fsdp": _shard}[strategy],
        all_reduce=partial(_all_reduce, where),
        **settings,
    )


def _all_reduce(device: torch.device, tensor: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
    there = tensor.to(device, copy=True)  # NCCL reduces nothing that lies on the CPU
    dist.all_reduce(there, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
    return there.to(tensor.device)


def _replicate(adapted: AdaptedModel) -> torch.nn.Module:
    adapted.to(adapted.model.device)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        return adapted
    return torch.nn.parallel.DistributedDataParallel(
        adapted,
        broadcast_buffers=False,  # nothing that is trained here changes them
        find_unused_parameters=True,  # experts without a token, say
        gradient_as_bucket_view=True,
    )


def _shard(adapted: AdaptedModel) -> torch.nn.Module:
    """Block by block from the CPU to the devices, each of which never holds more than its shards and one block.

    In half precision the blocks are gathered in half, and what passes between them is in half too. (Under autocast alone, as
    without sharding, the graph would keep a copy of every weight for the backward pass: the whole model on each device.)
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(adapted.model.device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=HALF.get(adapted.model.precision), reduce_dtype=torch.float32)
    for block in _blocks(adapted.network):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    return fully_shard(adapted, mesh=mesh)


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks, by the names that transformers gives them.

    Raises:
        UserError: it gives none.
    """
    blocks = find_blocks(network)
    if not blocks:
        raise UserError(
            f"model: transformers does not name the blocks of {network.config.model_type!r} models, so they cannot be sharded. "
            "Use the strategy ddp."
        )
    return blocks


def is_lost_peer(error: Exception) -> bool:
    """Whether another process of the group ended while this one waited for it."""
    return isinstance(error, getattr(dist, "DistError", ())) or "/gloo/" in str(error)  # gloo has no exception of its own


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this process holds only a part of a parameter."""
    return hasattr(parameter, "to_local")


def shard_of(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, without its gradient; all of it where it is not sharded."""
    return parameter.detach().to_local() if is_sharded(parameter) else parameter.detach()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter; gathered where it is sharded, so that every process must call this."""
    return parameter.detach().full_tensor() if is_sharded(parameter) else parameter.detach()
