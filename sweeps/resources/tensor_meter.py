"""What tensor operations do, seen from inside PyTorch: the bytes that are alive, and what is computed."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Meter(TorchDispatchMode):
    """Adds up the bytes of every storage that is made inside and still alive; `peak` is the most since it was set last."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


class Operations(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[func] += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    """x W in bf16, W unpacked for the moment and again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Packed) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.unpacked(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.unpacked(gradient).T, None


class Packed(nn.Linear):
    """A linear layer whose weight is one byte for two numbers, and about another for each block of 64 as its scale."""

    def __init__(self, n_in: int, n_out: int, bias: nn.Parameter | None):
        with torch.device("meta"):
            super().__init__(n_in, n_out, bias=False)
            n_bytes = n_in * n_out // 2
            self.weight = nn.Parameter(torch.empty(n_bytes, 1, dtype=torch.uint8), requires_grad=False)
            self.register_buffer("scales", torch.empty(n_bytes // 32, dtype=torch.uint8))
        self.bias = bias

    def unpacked(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(self.in_features, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _Product.apply(x.to(torch.bfloat16), self)
        return (product if self.bias is None else product + self.bias.to(torch.bfloat16)).to(x.dtype)


def hold_in_4_bits(network: nn.Module) -> None:
    """Put stand-ins in the place of every linear layer but the head, as transformers does with bitsandbytes' layers."""
    from transformers.pytorch_utils import Conv1D

    head = network.get_output_embeddings()
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear | Conv1D) and layer is not head:
                n_in, n_out = layer.weight.shape if isinstance(layer, Conv1D) else reversed(layer.weight.shape)
                setattr(module, name, Packed(n_in, n_out, layer.bias))
