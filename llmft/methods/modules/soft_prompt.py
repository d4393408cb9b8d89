"""Learned prompts, as modules that a method adds to the network (`network.soft_prompt`), and the tokens that they resemble."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmft.errors import UserError
from llmft.models import LoadedModel, encode_prefix
from llmft.records import VirtualToken

N_NEAREST = 3
N_FREQUENT = 5000  # Lester et al. 2021; subword vocabularies list frequent tokens first


class SoftPrompt(nn.Module):
    """One trained vector per virtual token, [virtual tokens, width]."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> torch.Tensor:
        return self.vectors


class EncodedPrompt(nn.Module):
    """The vectors that one of peft's prompt encoders computes for its positions, [virtual tokens, width]."""

    def __init__(self, encoder: nn.Module, n_virtual_tokens: int):
        super().__init__()
        self.encoder, self.n_virtual_tokens = encoder, n_virtual_tokens

    @classmethod
    def seeded(cls, build: Callable[[], nn.Module], n_virtual_tokens: int, generator: torch.Generator) -> EncodedPrompt:
        """Build one whose encoder is initialised from `generator`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            return cls(build(), n_virtual_tokens)

    def forward(self) -> torch.Tensor:
        positions = torch.arange(self.n_virtual_tokens, device=next(self.encoder.parameters()).device)
        return self.encoder(positions[None])[0]


def train_only(model: LoadedModel, prompt: nn.Module) -> None:
    """Add `prompt` to the network, and freeze everything else."""
    model.network.requires_grad_(False)
    model.network.soft_prompt = prompt.requires_grad_(True)


def sample_tokens(n_tokens: int, special_ids: Collection[int], n: int, generator: torch.Generator) -> torch.Tensor:
    """Sample [n] ids of frequent tokens, none twice while there are enough.

    Args:
        n_tokens: the vocabulary's size.
        special_ids: tokens that are left out.
    """
    frequent = torch.tensor([i for i in range(min(N_FREQUENT, n_tokens)) if i not in special_ids])
    rounds = -(-n // len(frequent))
    return torch.cat([frequent[torch.randperm(len(frequent), generator=generator)] for _ in range(rounds)])[:n]


@torch.no_grad()
def cached_tokens(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute the keys and values of the tokens `ids`, [tokens, layers, 2, heads, size].

    Raises:
        UserError: the layers keep keys and values of different shapes.
    """
    on_device = replace(model, device=next(model.network.parameters()).device, precision="fp32")
    layers = encode_prefix(on_device, ids.tolist()).layers  # each [1, heads, tokens, size]
    if len({tensor.shape for layer in layers for tensor in layer}) > 1:
        raise UserError(
            f"method 'prefix_tuning': the layers of {model.network.config.model_type!r} models keep keys and values of different "
            "shapes. Use prompt_tuning."
        )
    return torch.stack([torch.cat(layer) for layer in layers]).permute(3, 0, 1, 2, 4).contiguous()


@torch.no_grad()
def nearest_tokens(vectors: torch.Tensor, embeddings: torch.Tensor, tokenizer: Any) -> list[VirtualToken]:
    """Find the tokens of the vocabulary that each virtual token is nearest to.

    Args:
        vectors: [virtual tokens, width].
        embeddings: the input embeddings, [vocabulary, width].
    """
    vectors, embeddings = vectors.float(), embeddings[: len(tokenizer)].float()  # rows beyond the vocabulary are padding
    cosine = nn.functional.normalize(vectors) @ nn.functional.normalize(embeddings).T
    distance = torch.cdist(vectors, embeddings, compute_mode="donot_use_mm_for_euclid_dist")

    def named(values: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
        return dict(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), values.tolist(), strict=True))

    n = min(N_NEAREST, len(embeddings))
    return [
        VirtualToken(cosine=named(*near.topk(n)), distance=named(*far.topk(n, largest=False)), norm=vector.norm().item())
        for near, far, vector in zip(cosine, distance, vectors, strict=True)
    ]
