"""From token ids to tensors: batches sorted by length, under a token budget, and the shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmft.models.batch_planning import query_budget
from llmft.models.loading import LoadedModel
from llmft.prompting import EncodedQueries, LabelWords


@dataclass(frozen=True)
class Prefix:
    """The opening tokens of every prompt, encoded once: keys and values per layer, each [1, heads, length, size].

    `is_shared`: whether all rows of a batch attend to these very tensors (`llmft.models.prefix_attention`), else each row gets a copy.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    length: int
    is_shared: bool = False

    def cache(self, n_rows: int):
        """A cache for `n_rows` prompts; a forward pass may append to it without touching the prefix."""
        from transformers import DynamicCache

        return DynamicCache([(key.expand(n_rows, -1, -1, -1), value.expand(n_rows, -1, -1, -1)) for key, value in self.layers])


def encode_prefix(model: LoadedModel, ids: Sequence[int]) -> Prefix:
    """Run the network over the tokens that all prompts share."""
    return read_prefix(model, ids)[0]


@torch.no_grad()
def read_prefix(model: LoadedModel, ids: Sequence[int]) -> tuple[Prefix, torch.Tensor]:
    """The prefix, and the last hidden states of its tokens, [1, length, width]."""
    from transformers import DynamicCache

    cache = DynamicCache()  # one that forgets nothing, also where the network's own would keep a sliding window only
    with model.autocast():
        read = model.network.base_model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), len(ids)), read.last_hidden_state


@dataclass(frozen=True)
class QueryBatch:
    """Queries ready for the network; padded on the right.

    With label words of several tokens every query has one row a label word (the word's last token left out), in that order;
    otherwise one row. An encoder reads each query once: there the rows are the decoder's.

    Attributes:
        input_ids, attention_mask: [rows, length]; the mask also covers what precedes the text, [rows, prefix + soft prompt + length].
            With an encoder they are what it reads, [queries, ...].
        answer_at: [rows], the place behind the prefix, or in `decoder_input_ids`, whose next token is the (first token of the)
            label word.
        labels: [queries], gold labels; None where text is generated.
        indices: [queries], their places in the set.
        label_words: None where text is generated.
        prefix: what precedes every row, already encoded; None where the rows hold everything.
        completions: [tokens], the tokens that shall follow each query, all queries' one after the other; `input_ids` hold all but
            the last of each. None where nothing but label words is trained.
        completion_lengths: how many of them are whose.
        decoder_input_ids: [rows, length of the longest row], what the decoder reads; None for causal models. Its padding needs
            no mask, since nothing before it sees it.
        soft_prompt: [virtual tokens, embedding width], embeddings that open every row; None where there are none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_at: torch.Tensor
    labels: torch.Tensor | None
    indices: torch.Tensor
    label_words: LabelWords | None
    prefix: Prefix | None = None
    completions: torch.Tensor | None = None
    completion_lengths: tuple[int, ...] = ()
    decoder_input_ids: torch.Tensor | None = None
    soft_prompt: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.indices.shape[0]

    @property
    def n_rows(self) -> int:
        return self.answer_at.shape[0]

    @property
    def position_ids(self) -> torch.Tensor:
        """[rows, soft prompt + length]; a padded place repeats the last position."""
        start = self.prefix.length if self.prefix else 0
        positions = torch.arange(start, self.attention_mask.shape[1], device=self.input_ids.device)
        last = self.attention_mask.sum(1, keepdim=True) - 1
        return torch.minimum(positions[None], last)


def with_soft_prompt(batch: QueryBatch, embeddings: torch.Tensor) -> QueryBatch:
    """The batch with `embeddings` [virtual tokens, embedding width] in front of every row."""
    if batch.prefix is not None:
        raise ValueError("a soft prompt opens the text: it cannot stand behind a prefix that was encoded without it")
    n = embeddings.shape[0]
    answer_at = batch.answer_at + n if batch.decoder_input_ids is None else batch.answer_at  # which an encoder does not move
    return replace(batch, attention_mask=_opened(batch.attention_mask, n), answer_at=answer_at, soft_prompt=embeddings)


def with_prefix(batch: QueryBatch, prefix: Prefix) -> QueryBatch:
    """The batch with the keys and values of `prefix` in front of every row."""
    if batch.prefix is not None:
        raise ValueError("learned keys and values open the text: they cannot stand behind a prefix that was encoded without them")
    return replace(batch, attention_mask=_opened(batch.attention_mask, prefix.length), prefix=prefix)


def _opened(mask: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([mask.new_ones(mask.shape[0], n), mask], 1)


def make_batch(
    queries: EncodedQueries,
    indices: Sequence[int],
    label_words: LabelWords | None,
    model: LoadedModel,
    prefix: Prefix | None = None,
    prefix_ids: tuple[int, ...] = (),
) -> QueryBatch:
    """The batch of the queries at `indices`.

    Args:
        prefix: what precedes every query, encoded; or
        prefix_ids: its token ids, to be put in front of every row instead.
    """
    endings = [()] if label_words is None or label_words.single else [ids[:-1] for ids in label_words.ids]
    read = [(*prefix_ids, *queries.suffixes[i]) for i in indices]
    before = [queries.decoder_prefix] * len(read) if queries.decoder_prefix else read  # what a word follows
    answer_at = [len(row) - 1 for row in before for _ in endings]
    full = [row + ending for row in before for ending in endings]
    completions = [queries.completions[i] for i in indices] if queries.completions else []
    if completions:
        full = [row + ids[:-1] for row, ids in zip(before, completions, strict=True)]
    ids, mask = _pad(read if queries.decoder_prefix else full)
    if prefix:
        mask = np.concatenate([np.ones((len(full), prefix.length), dtype=np.int64), mask], axis=1)

    def tensor(values) -> torch.Tensor:
        return torch.as_tensor(values, device=model.device)

    return QueryBatch(
        input_ids=tensor(ids),
        attention_mask=tensor(mask),
        answer_at=tensor(answer_at),
        labels=tensor([queries.labels[i] for i in indices]) if queries.labels else None,
        indices=tensor(list(indices)),
        label_words=label_words,
        prefix=prefix,
        completions=tensor([token for ids in completions for token in ids]) if completions else None,
        completion_lengths=tuple(map(len, completions)),
        decoder_input_ids=tensor(_pad(full)[0]) if queries.decoder_prefix else None,
    )


def _pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, padded on the right, and their mask; [rows, length] each."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return ids, mask


def scoring_budget(budget: int, prefix: Prefix | None) -> tuple[int, int]:
    """Return the tokens of a forward pass over queries, and how many each row has besides its own: those of a prefix not shared."""
    if prefix is not None and not prefix.is_shared:
        return budget, prefix.length
    return query_budget(budget, prefix.length if prefix else 0), 0
