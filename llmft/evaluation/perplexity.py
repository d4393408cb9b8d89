"""The likelihood of a text under a language model, and the perplexities that follow from it.

The windows and units are lm-evaluation-harness's (`loglikelihood_rolling`, the task `wikitext`), so that numbers compare: a word is
what stands between white space, the first token follows the model's opening token, and the text is one document.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmft.errors import Cause, TrialFailure
from llmft.models import AdaptedModel, all_logits, batch_by_tokens, make_batch
from llmft.prompting import EncodedQueries, LabelWords, encode

UNBOUNDED = 2048  # tokens of a window where the model's positions have no bound, as in the harness
NO_ANSWER = LabelWords(("",), ((0,),))  # a text has no label; one token, so that it takes one row


@dataclass(frozen=True)
class TextLikelihood:
    """`log_likelihood` is the sum over the text's tokens, in nats; `n_tokens` counts the tokenizer's opening token, if it has one."""

    log_likelihood: float
    n_tokens: int
    n_words: int
    n_bytes: int

    @property
    def token_perplexity(self) -> float:
        """Depends on the tokenizer: compare it only between models that share one."""
        return _exp(-self.log_likelihood / self.n_tokens)

    @property
    def word_perplexity(self) -> float:
        return _exp(-self.log_likelihood / self.n_words)

    @property
    def byte_perplexity(self) -> float:
        return _exp(-self.log_likelihood / self.n_bytes)

    @property
    def bits_per_byte(self) -> float:
        return -self.log_likelihood / self.n_bytes / math.log(2)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def windows(n_tokens: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, n) of each window: its row is `tokens[begin:end]`, of which the last n + 1 are the n scored tokens and what
    precedes them. The tokens from 1 on are scored, each once.

    Args:
        n_tokens: with the opening token in front.
        length: tokens that the model sees at most.
        stride: tokens that a window scores; the rest of it is context. The last window is filled up with context.
    """
    ends = [min(start + stride, n_tokens - 1) for start in range(0, n_tokens - 1, stride)]
    return [(max(0, end - length), end + 1, end - start) for start, end in zip([0, *ends], ends, strict=False)]


@torch.no_grad()
def text_likelihood(
    adapted: AdaptedModel, tokenizer, text: str, length: int, stride: int | None = None, budget: int = 2048
) -> TextLikelihood:
    """The likelihood of a text.

    Args:
        adapted: the model, placed on its device.
        length: tokens of a window, at most the model's context; virtual ones are taken off.
        stride: tokens that each window scores; None: all of it (windows then share one token, which is the harness's way). A
            smaller stride gives every token at least `length - stride` of context, and takes that much longer.
        budget: tokens in one forward pass, unless one window has more; every one needs a row of logits.

    Raises:
        TrialFailure: the likelihood is not finite (DIVERGED).
    """
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens = [opening, *encode(tokenizer, [text])[0]]
    length -= adapted.n_virtual_tokens
    parts = windows(len(tokens), length, min(stride or length, length))
    adapted.network.eval()
    total = 0.0
    for group in batch_by_tokens([end - begin - 1 for begin, end, _ in parts], budget):
        rows = [tokens[parts[i][0] : parts[i][1]] for i in group]
        total += _log_likelihood(adapted, rows, [parts[i][2] for i in group])
    if not math.isfinite(total):
        raise TrialFailure(Cause.DIVERGED, f"the log-likelihood of the text is {total}.")
    return TextLikelihood(total, len(tokens) - 1, len(re.split(r"\s+", text)), len(text.encode()))


def _log_likelihood(adapted: AdaptedModel, rows: Sequence[list[int]], n_scored: Sequence[int]) -> float:
    """The sum over the last `n_scored` tokens of each row."""
    queries = EncodedQueries(tuple(tuple(row[:-1]) for row in rows), (0,) * len(rows))
    logits = adapted(all_logits, make_batch(queries, range(len(rows)), NO_ANSWER, adapted.model))
    total = 0.0
    for row, n, of_row in zip(rows, n_scored, logits, strict=True):
        targets = torch.tensor(row[-n:], device=logits.device)
        here = of_row[len(row) - 1 - n : len(row) - 1].float()  # [n, words]
        total -= torch.nn.functional.cross_entropy(here, targets, reduction="none").double().sum().item()
    return total
