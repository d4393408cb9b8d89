"""From token ids to tensors: batches sorted by length, under a token budget, and the shared prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmft.answers import LabelWords
from llmft.model import BorrowedModel
from llmft.tokens import EncodedQueries

BUSY_PASS = 2048  # tokens: what keeps a device busy
PASS_TOKENS = {"cpu": 64}
"""How many tokens a training pass costs besides its own, by the kind of device; `PASS_TOKENS_ELSEWHERE` on others. An estimate: a pass
of a GPU takes the time of so many tokens, at least, to be launched, layer by layer."""
PASS_TOKENS_ELSEWHERE = 1024


@dataclass(frozen=True)
class Prefix:
    """The opening tokens of every prompt, encoded once: keys and values per layer, each [1, heads, length, size].

    `is_shared`: whether all rows of a batch attend to these very tensors (`llmft.shared_prefix`), else each row gets a copy.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    length: int
    is_shared: bool = False

    def cache(self, n_rows: int):
        """A cache for `n_rows` prompts; a forward pass may append to it without touching the prefix."""
        from transformers import DynamicCache

        return DynamicCache([(key.expand(n_rows, -1, -1, -1), value.expand(n_rows, -1, -1, -1)) for key, value in self.layers])


def encode_prefix(model: BorrowedModel, ids: Sequence[int]) -> Prefix:
    """Run the network over the tokens that all prompts share."""
    return read_prefix(model, ids)[0]


@torch.no_grad()
def read_prefix(model: BorrowedModel, ids: Sequence[int]) -> tuple[Prefix, torch.Tensor]:
    """The prefix, and the last hidden states of its tokens, [1, length, width]."""
    from transformers import DynamicCache

    cache = DynamicCache()  # one that forgets nothing, also where the network's own would keep a sliding window only
    with model.autocast():
        read = model.network.base_model(
            input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True
        )
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
        words: the label words; None where text is generated.
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
    words: LabelWords | None
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
        raise ValueError(
            "learned keys and values open the text: they cannot stand behind a prefix that was encoded without them"
        )
    return replace(batch, attention_mask=_opened(batch.attention_mask, prefix.length), prefix=prefix)


def _opened(mask: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([mask.new_ones(mask.shape[0], n), mask], 1)


def make_batch(
    queries: EncodedQueries,
    indices: Sequence[int],
    words: LabelWords | None,
    model: BorrowedModel,
    prefix: Prefix | None = None,
    opening: tuple[int, ...] = (),
) -> QueryBatch:
    """The batch of the queries at `indices`.

    Args:
        prefix: the encoded opening; or
        opening: its tokens, to be put in front of every row instead.
    """
    endings = [()] if words is None or words.single else [ids[:-1] for ids in words.ids]
    read = [(*opening, *queries.suffixes[i]) for i in indices]
    before = [queries.start] * len(read) if queries.start else read  # what a word follows
    answer_at = [len(row) - 1 for row in before for _ in endings]
    full = [row + ending for row in before for ending in endings]
    completions = [queries.completions[i] for i in indices] if queries.completions else []
    if completions:
        full = [row + ids[:-1] for row, ids in zip(before, completions, strict=True)]
    ids, mask = _pad(read if queries.start else full)
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
        words=words,
        prefix=prefix,
        completions=tensor([token for ids in completions for token in ids]) if completions else None,
        completion_lengths=tuple(map(len, completions)),
        decoder_input_ids=tensor(_pad(full)[0]) if queries.start else None,
    )


def _pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, padded on the right, and their mask; [rows, length] each."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return ids, mask


def split_for_training(lengths: Sequence[int], budget: int, device: torch.device) -> list[list[int]]:
    """Group the examples of one step so that padding and passes together cost least.

    Batches of text are mostly padding: the longest of 32 premises is often four times as long as most. Where the groups begin is found
    by dynamic programming over the examples in order of length; a pass costs its padded tokens and `PASS_TOKENS`.

    Args:
        lengths, budget: as for `split_by_tokens`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes, per_pass = np.array([lengths[i] for i in order]), PASS_TOKENS.get(device.type, PASS_TOKENS_ELSEWHERE)
    cost, begins = np.zeros(len(order) + 1), [0] * (len(order) + 1)  # of the first n examples; where the last of their groups begins
    for end in range(1, len(order) + 1):
        n_rows = end - np.arange(end)
        tokens = sizes[:end] * n_rows
        whole = np.where((tokens <= budget) | (n_rows == 1), cost[:end] + tokens + per_pass, np.inf)
        begins[end] = int(whole.argmin())
        cost[end] = whole[begins[end]]
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def hardest_step(
    lengths: Sequence[int], batch_size: int, budget: int, device: torch.device, n_processes: int = 1
) -> list[list[int]]:
    """The groups of the step that has the largest pass, among steps of examples much alike, which are padded together. Of several
    processes, which do not cut a step further than they must, what the first gets of the longest examples.

    Args:
        lengths: tokens of all that is trained on, the longest first.
        budget, device: as for `split_for_training`.

    Returns:
        Places in `lengths`.
    """
    if n_processes > 1:
        mine = range(len(lengths))[:batch_size:n_processes]
        return [[mine[i] for i in group] for group in split_by_tokens([lengths[i] for i in mine], budget)]
    steps = []
    for start in range(0, max(1, len(lengths) - batch_size + 1), max(1, batch_size // 4)):
        groups = split_for_training(lengths[start : start + batch_size], budget, device)
        steps.append([[start + i for i in group] for group in groups])
    return max(steps, key=lambda groups: max(lengths[group[0]] * len(group) for group in groups))


def deal(
    lengths: Sequence[int], budget: int, rank: int = 0, world_size: int = 1, overhead: int = 0
) -> list[tuple[list[int], bool]]:
    """Share queries out over the processes, and split each share by `split_by_tokens`.

    Args:
        rank: whose share.
        lengths, budget, overhead: as for `split_by_tokens`.

    Returns:
        The groups of this process, and whether each counts. Every process gets as many groups, since all must take part in what
        they compute together: where it has fewer of its own, the shortest query fills up, which does not count.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares = [order[start::world_size] for start in range(world_size)]
    groups = [
        [[share[i] for i in group] for group in split_by_tokens([lengths[i] for i in share], budget, overhead)]
        for share in shares
    ]
    n_missing = max(map(len, groups)) - len(groups[rank])
    return [(group, True) for group in groups[rank]] + [(order[-1:], False)] * n_missing


def smaller_budget(passes: Iterable[Sequence[int]]) -> int | None:
    """Half of the tokens in the largest forward pass of several queries.

    Args:
        passes: the lengths of the queries of each.

    Returns:
        None where every pass is a single query already.
    """
    largest = max((max(lengths) * len(lengths) for lengths in passes if len(lengths) > 1), default=None)
    return largest and largest // 2


def query_budget(budget: int, prefix_length: int) -> int:
    """The tokens of a forward pass over queries whose rows hold nothing of a prefix; 0 where there is none.

    It need not be larger than the pass that encoded the prefix, so that the queries take no more memory than that did; nor, where
    there was none, than keeps a device busy: larger ones would only hold more padding.
    """
    return min(budget, max(prefix_length, BUSY_PASS))


def scoring_budget(budget: int, prefix: Prefix | None) -> tuple[int, int]:
    """The tokens of a forward pass over queries, and how many of them each row has besides its own: those of a prefix that is not shared."""
    if prefix is not None and not prefix.is_shared:
        return budget, prefix.length
    return query_budget(budget, prefix.length if prefix else 0), 0


def split_by_tokens(lengths: Sequence[int], budget: int, overhead: int = 0) -> list[list[int]]:
    """Group queries of similar length so that a padded group holds at most `budget` tokens (or is a single query).

    Args:
        lengths: tokens of each query.
        overhead: tokens that every row carries besides (the prefix's).

    Returns:
        Groups of indices into `lengths`, longest queries first, so that what will not fit in memory shows at once.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (lengths[groups[-1][0]] + overhead) * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
