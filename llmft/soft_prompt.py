"""Learned openings of a prompt, as modules that a method hangs into the network (`network.soft_prompt`), and what they resemble."""

from __future__ import annotations

import torch
from torch import nn

from llmft.model import BorrowedModel
from llmft.record import VirtualToken

N_NEAREST = 3


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

    def forward(self) -> torch.Tensor:
        places = torch.arange(self.n_virtual_tokens, device=self.encoder.embedding.weight.device)
        return self.encoder(places[None])[0]


def trained_alone(model: BorrowedModel, prompt: nn.Module) -> None:
    """Hang `prompt` into the network; nothing else is trained."""
    model.network.requires_grad_(False)
    model.network.soft_prompt = prompt.requires_grad_(True)


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
