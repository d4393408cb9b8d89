"""Count what a trial's network takes, on the meta device: parameters, gradients, optimizer states, and its dimensions."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch

from llmft.config import ModelRef, TrialSpec
from llmft.methods import Method
from llmft.models import DROPOUT, HALF, LoadedModel, find_blocks, language_model, load_config
from llmft.training import state_bytes
from sweeps.resources.workload import Workload

ACTIVATIONS = {"relu": 1, "gelu_new": 5, "gelu_fast": 5}
"""Tensors as wide as the feed-forward layer that an activation function and the layer behind it keep; 2 for all others."""

ACTIVATION_KEYS = ("dense_act_fn", "activation_function", "hidden_act", "hidden_activation")
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop")


@lru_cache(maxsize=4)
def _load_base(ref: ModelRef, dropout: float | None) -> torch.nn.Module:
    """The network in fp32 on the meta device, as `llmft.models.borrow_model` loads it."""
    config = copy.deepcopy(load_config(ref))
    for name in DROPOUT.get(config.model_type, ()) if dropout is not None else ():
        setattr(config, name, dropout)
    with torch.device("meta"):
        network = language_model(config).from_config(config, dtype=torch.float32)
        if not getattr(config, "scale_decoder_outputs", True):  # T5 1.1: transformers ties it until it sees the weights
            network.set_output_embeddings(copy.deepcopy(network.get_output_embeddings()))
    return network.requires_grad_(False).eval()


class NetworkSizes:
    """Sizes of a trial's network as its method has prepared it, and the dimensions that its activations follow from.

    In 4 bits, two numbers take a byte, and 64 of them share a scale of one byte. `gathered_bytes` is what `fully_shard` holds whole: the
    weights outside of blocks, those of one block and the next, and their gradients.

    Args:
        method: None for a teacher, which trains nothing.
        n_labels: of the task; 0 where text is generated.
    """

    def __init__(self, ref: ModelRef, spec: TrialSpec, method: Method | None, n_labels: int):
        base_network = _load_base(ref, spec.train.dropout).requires_grad_(False)
        network: Any = _copy_tree(base_network, {})
        config: Any = base_network.config
        self.is_half, trains = spec.precision in HALF, method is not None and method.trains
        self.number_bytes = 2 if self.is_half else 4
        self.has_dropout = any(getattr(config, key, 0) for key in DROPOUT.get(config.model_type, ()))
        self.has_attention_dropout = any(getattr(config, key, 0) for key in ATTENTION_DROPOUT)
        self.is_eager = config._attn_implementation == "eager" or hasattr(config, "relative_attention_num_buckets")  # a bias of its size
        packed = {id(layer.weight) for layer in _linear_layers(network)} if method and method.base_weights == "nf4" else set()
        base = {id(parameter) for parameter in network.parameters()}
        self.n_parameters, self.base_bytes = sum(p.numel() for p in network.parameters()), _n_bytes(network, packed)
        self.largest_bytes, self.start_bytes = max(p.nbytes for p in network.parameters()), 0
        if method and trains:
            model = LoadedModel(network, torch.device("meta"), spec.precision, plain_head=True)
            method.prepare(model, n_labels, torch.Generator().manual_seed(0))
            named = network.named_parameters()
            self.start_bytes = sum(p.nbytes for name, p in named if p.requires_grad and name in model.base_names)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.weight_bytes = _n_bytes(network, packed) // (2 if self.is_half and not trains else 1)
        self.n_trainable, self.gradient_bytes = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
        self.largest_gradient_bytes = max((p.nbytes for p in trained), default=0)
        self.optimizer_bytes = sum(state_bytes(spec.train, p) for p in trained)

        blocks = find_blocks(network)
        heads, self.width = getattr(config, "num_attention_heads", 1), config.hidden_size
        head_width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or self.width // heads
        self.n_heads, self.kv_width = heads, head_width * (getattr(config, "num_key_value_heads", None) or heads)
        self.depth = len(blocks) or config.num_hidden_layers
        shapes = [layer.weight.shape for layer in _linear_layers(blocks[0]) if id(layer.weight) in base] if blocks else []
        self.inner_width = max((max(shape) for shape in shapes), default=4 * self.width)
        is_gated = sum(self.inner_width in shape for shape in shapes) > 2
        trained_blocks = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        self.trains_matrices = any(p.ndim > 1 and id(p) in base for block in trained_blocks for p in block)
        added = [p.shape for p in (trained_blocks[-1] if blocks else ()) if p.ndim > 1 and id(p) not in base]
        inputs = [max(shape) if min(shape) == 1 else shape[-1] for shape in added]
        self.added_width = sum(width for width in inputs if width <= self.width)  # what the layers added to a block read
        self.n_block_parameters = sum(p.numel() for block in blocks for p in block.parameters())
        encoder = set(network.get_encoder().modules()) if config.is_encoder_decoder else set(blocks)
        self.n_decoder_blocks = sum(block not in encoder for block in blocks)
        words, head = network.get_input_embeddings().weight, network.get_output_embeddings()
        self.n_words, self.n_embedded = words.shape[0], words.numel()
        self.is_tied = head is None or head.weight is words
        layer_types = set(getattr(config, "layer_types", None) or ())
        self.shares_prefix = network._supports_attention_backend and not layer_types - {"full_attention"}
        name = next((getattr(config, key) for key in ACTIVATION_KEYS if isinstance(getattr(config, key, None), str)), "")
        self.n_inner = ACTIVATIONS.get(name, 2) + 2 * is_gated - (not self.trains_matrices and name != "relu")
        self.n_above = self.depth - next((i for i, block in enumerate(trained_blocks) if block), self.depth)  # of the lowest trained block
        self.trains_input = words.requires_grad or (bool(trained) and not blocks)

        sizes = [
            (sum(p.numel() for p in block.parameters()), sum(p.nbytes for p in own))
            for block, own in zip(blocks, trained_blocks, strict=True)
        ]
        block, own = max(sizes, default=(0, 0))
        self.gathered_bytes = self.weight_bytes - 4 * sum(n for n, _ in sizes) + 2 * self.number_bytes * block
        self.gathered_bytes += self.gradient_bytes - sum(n for _, n in sizes) + own


def count_networks(work: Workload) -> tuple[NetworkSizes, NetworkSizes | None]:
    """Count the network of the workload's trial, and that of its teacher where it has one.

    Raises:
        UserError: the method cannot prepare this model.
    """
    spec = work.spec
    teacher = NetworkSizes(spec.teacher or spec.model, spec, None, 0) if work.teacher else None
    return NetworkSizes(spec.model, spec, work.method, work.n_words), teacher


def _linear_layers(module: torch.nn.Module) -> list[Any]:
    """Every linear layer inside of a module but the output embedding."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(module, "get_output_embeddings", lambda: None)()
    return [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear | Conv1D) and layer is not head]


def _n_bytes(network: torch.nn.Module, packed: set[int]) -> int:
    """Bytes of all tensors; `packed` holds the ids of those in 4 bits."""
    tensors = [*network.parameters(), *network.buffers()]
    n_packed = sum(tensor.numel() for tensor in tensors if id(tensor) in packed)
    return sum(tensor.nbytes for tensor in tensors if id(tensor) not in packed) + n_packed // 2 + n_packed // 64


def _copy_tree(module: torch.nn.Module, copies: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """Copy the modules and share their tensors; a deep copy of a network of 30 blocks takes longer than all else."""
    if id(module) not in copies:
        copied = copies[id(module)] = copy.copy(module)
        copied.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else _copy_tree(child, copies)
    return copies[id(module)]
