"""Attention of many rows to one prefix, whose keys and values are held once and never copied for a row.

A query of any row attends to the prefix and to its own row. The two parts are computed apart, each with the logarithm of its sum
of exponentials, and joined by these weights; that is the softmax over both (as in blockwise attention, Liu et al. 2023). All rows'
queries stand in one long product with the prefix, so that its keys are also read once for the whole batch. Rows are padded on the
right, where a causal model does not look, so no mask is needed.

It serves networks whose attention goes through transformers' interface and is nothing but causal: no sliding window, no cap on the
scores, no bias by distance. Whether a network is one is found out and not looked up in a list: the end of every prefix is read
again in this way, and where it does not come out as before, each row gets a copy of the keys and values, as transformers does it.
On CUDA the kernel is PyTorch's memory-efficient one, which was never run in the making of this; the same check covers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmft.models.batches import Prefix, read_prefix
from llmft.models.loading import HALF, LoadedModel

NAME = "llmft_shared_prefix"
N_COMPARED = 4  # tokens at the prefix's end that are read in both ways
CHUNK = 256  # queries at once where scores are held as a matrix
PLAIN = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "attention_mask"}
"""What transformers may tell an attention function without asking for more than causal attention."""


class CannotShare(Exception):
    """This network's attention is more than what is computed here."""


class NewKeys(DynamicCache):
    """Looks like an empty cache to the network and keeps nothing; knows which layer's turn it is."""

    def __init__(self, prefix: Prefix):
        super().__init__()
        self.prefix, self.layer, self.n_read = prefix, None, 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.layer = layer_idx
        return key_states, value_states

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix's keys and values in the layer that asks, each [1, key heads, length, size]."""
        if self.layer is None:
            raise CannotShare("a layer attends without having written to the cache")
        layer, self.layer = self.layer, None
        self.n_read += 1
        return self.prefix.layers[layer]


_CACHE: ContextVar[NewKeys] = ContextVar("cache")


def attend(module, query, key, value, attention_mask, scaling=None, **told):
    """As transformers' attention functions: `query` [rows, heads, length, size] and the new keys and values of the rows alone.

    Raises:
        CannotShare: something is asked for that is not computed here.
    """
    if odd := [name for name, what in told.items() if what is not None and what is not False and name not in PLAIN]:
        raise CannotShare(f"it asks for {', '.join(odd)}")
    if attention_mask is not None or told.get("is_causal") is False:
        raise CannotShare("it has a mask of its own")
    prefix = _CACHE.get().read()
    n, heads, length, size = query.shape
    query, key, *prefix = (tensor.to(value.dtype) for tensor in (query, key, *prefix))
    key_heads = key.shape[1]
    each = heads // key_heads  # queries' heads that one head of keys answers
    stacked = query.reshape(n, key_heads, each * length, size).transpose(0, 1).reshape(1, key_heads, n * each * length, size)
    to_prefix, prefix_sum = attention(stacked, *prefix, causal=False, scale=scaling)
    to_prefix = to_prefix.reshape(key_heads, n, each * length, size).transpose(0, 1).reshape(query.shape)
    prefix_sum = prefix_sum.reshape(key_heads, n, each * length).transpose(0, 1).reshape(n, heads, length)
    if each > 1:
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    to_own, own_sum = attention(query, key, value, causal=True, scale=scaling)
    share = torch.sigmoid(prefix_sum - own_sum)[..., None].to(value.dtype)
    return torch.lerp(to_own, to_prefix, share).transpose(1, 2).contiguous(), None


def attention(query, key, value, *, causal: bool, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, [rows, heads, queries, size], and the logarithm of each query's sum of exponentials, [rows, heads, queries]."""
    if query.device.type == "cpu" and query.dtype is not torch.float16:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    if query.device.type == "cuda" and query.shape[-1] % 8 == 0:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, causal, scale=scale)
        return found[0], found[1][..., : query.shape[2]]  # whose second is padded
    return matrix_attention(query, key, value, causal=causal, scale=scale)


def matrix_attention(query, key, value, *, causal: bool, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from the matrix of scores, `CHUNK` queries at a time."""
    outputs, sums, places = [], [], torch.arange(key.shape[2], device=key.device)
    for start in range(0, query.shape[2], CHUNK):
        part = query[:, :, start : start + CHUNK]
        scores = (part @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(places > places[start : start + CHUNK, None], -torch.inf)
        outputs.append(scores.softmax(-1).to(value.dtype) @ value)
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs, 2), torch.cat(sums, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def shared_attention(network: torch.nn.Module, prefix: Prefix) -> Iterator[NewKeys]:
    """Within: the network's rows attend to `prefix` and themselves, if they are given the cache that this yields.

    Their mask covers their own tokens alone, their positions count from the prefix's end.
    """
    usual, cache = network.config._attn_implementation, NewKeys(prefix)
    token, network.config._attn_implementation = _CACHE.set(cache), NAME
    try:
        yield cache
    finally:
        network.config._attn_implementation = usual
        _CACHE.reset(token)


def read_shared(network: torch.nn.Module, ids: torch.Tensor, prefix: Prefix) -> torch.Tensor | None:
    """The last hidden states of `ids` [rows, length] behind the prefix, [rows, length, width]; None where the network's attention
    is of another kind, as far as that shows without numbers."""
    layer_types = set(getattr(network.config, "layer_types", None) or ())
    if not network._supports_attention_backend or layer_types - {"full_attention"}:
        return None
    places = torch.arange(prefix.length, prefix.length + ids.shape[1], device=ids.device).expand(len(ids), -1)
    with shared_attention(network, prefix) as cache:
        try:
            read = network.base_model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True)
        except CannotShare:
            return None
    return read.last_hidden_state if cache.n_read == len(prefix.layers) else None


@torch.no_grad()
def encode_shared(model: LoadedModel, ids: Sequence[int]) -> Prefix:
    """The prefix of token ids, shared by the rows behind it if its own end, read as such rows, comes out as it did."""
    prefix, states = read_prefix(model, ids)
    n = min(N_COMPARED, prefix.length // 2)
    if not n:
        return prefix
    shorter = Prefix(tuple((key[:, :, :-n], value[:, :, :-n]) for key, value in prefix.layers), prefix.length - n)
    try:
        again = read_shared(model.network, torch.tensor([ids[-n:]] * 2, device=model.device), shorter)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # a device without the kernel
        return prefix
    if again is None:
        return prefix
    rounding = torch.finfo(HALF.get(model.precision, torch.float32)).eps ** 0.5 * states.abs().max()
    return replace(prefix, is_shared=bool((again - states[:, -n:]).abs().max() <= rounding))
