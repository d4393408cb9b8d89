"""Learned openings of a prompt, as modules that a method hangs into the network (`network.soft_prompt`), and what they resemble."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import nn

from llmft.errors import UserError
from llmft.models import LoadedModel, encode_prefix
from llmft.records import VirtualToken

N_NEAREST = 3
N_FREQUENT = 5000  # Lester et al. 2021; subword vocabularies list frequent words first


class SoftPrompt(nn.Module):
    """One trained vector a virtual token, [virtual tokens, width]."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> torch.Tensor:
        return self.vectors


class EncodedPrompt(nn.Module):
    """The vectors that one of peft's prompt encoders makes of its places, [virtual tokens, width]."""

    def __init__(self, encoder: nn.Module, n_virtual_tokens: int):
        super().__init__()
        self.encoder, self.n_virtual_tokens = encoder, n_virtual_tokens

    @classmethod
    def seeded(cls, build: Callable[[], nn.Module], n_virtual_tokens: int, generator: torch.Generator) -> EncodedPrompt:
        """One whose encoder takes its random numbers from `generator`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            return cls(build(), n_virtual_tokens)

    def forward(self) -> torch.Tensor:
        places = torch.arange(self.n_virtual_tokens, device=self.encoder.embedding.weight.device)
        return self.encoder(places[None])[0]


def trained_alone(model: LoadedModel, prompt: nn.Module) -> None:
    """Hang `prompt` into the network; nothing else is trained."""
    model.network.requires_grad_(False)
    model.network.soft_prompt = prompt.requires_grad_(True)


def sample_words(n_words: int, special_ids: Collection[int], n: int, generator: torch.Generator) -> torch.Tensor:
    """[n] ids of frequent words, none twice while there are enough.

    Args:
        n_words: the vocabulary's size.
        special_ids: what is no word.
    """
    frequent = torch.tensor([i for i in range(min(N_FREQUENT, n_words)) if i not in special_ids])
    rounds = -(-n // len(frequent))
    return torch.cat([frequent[torch.randperm(len(frequent), generator=generator)] for _ in range(rounds)])[:n]


@torch.no_grad()
def cached_words(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """The keys and values that the words `ids` leave in the cache, [words, layers, 2, heads, size].

    Raises:
        UserError: the layers keep keys and values of different shapes.
    """
    here = replace(model, device=next(model.network.parameters()).device, precision="fp32")
    layers = encode_prefix(here, ids.tolist()).layers  # each [1, heads, words, size]
    if len({tensor.shape for layer in layers for tensor in layer}) > 1:
        raise UserError(
            f"method 'prefix_tuning': the layers of {model.network.config.model_type!r} models keep keys and values of different "
            "shapes. Use prompt_tuning."
        )
    return torch.stack([torch.cat(layer) for layer in layers]).permute(3, 0, 1, 2, 4).contiguous()


@torch.no_grad()
def nearest_words(vectors: torch.Tensor, words: torch.Tensor, tokenizer) -> list[VirtualToken]:
    """The words of the vocabulary that each virtual token is nearest to.

    Args:
        vectors: [virtual tokens, width].
        words: the input embeddings, [vocabulary, width].
    """
    vectors, words = vectors.float(), words[: len(tokenizer)].float()  # rows beyond the vocabulary only fill up
    cosine = nn.functional.normalize(vectors) @ nn.functional.normalize(words).T
    distance = torch.cdist(vectors, words, compute_mode="donot_use_mm_for_euclid_dist")

    def named(values: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
        return dict(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), values.tolist(), strict=True))

    n = min(N_NEAREST, len(words))
    return [
        VirtualToken(cosine=named(*near.topk(n)), distance=named(*far.topk(n, largest=False)), norm=vector.norm().item())
        for near, far, vector in zip(cosine, distance, vectors, strict=True)
    ]
