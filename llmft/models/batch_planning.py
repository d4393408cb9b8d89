"""Decide which queries share a forward pass, and how many tokens it may hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

MAX_PASS_TOKENS = 2048  # tokens: what keeps a device busy
PASS_OVERHEAD_TOKENS = {"cpu": 64}
"""How many tokens a training pass costs besides its own, by the kind of device; `PASS_TOKENS_ELSEWHERE` on others. An estimate: a pass
of a GPU takes the time of so many tokens, at least, to be launched, layer by layer."""
DEFAULT_PASS_OVERHEAD_TOKENS = 1024


def split_for_training(lengths: Sequence[int], budget: int, device: torch.device) -> list[list[int]]:
    """Group the examples of one step so that padding and passes together cost least.

    Batches of text are mostly padding: the longest of 32 premises is often four times as long as most. Where the groups begin is found
    by dynamic programming over the examples in order of length; a pass costs its padded tokens and `PASS_TOKENS`.

    Args:
        lengths, budget: as for `split_by_tokens`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    sizes, per_pass = np.array([lengths[i] for i in order]), PASS_OVERHEAD_TOKENS.get(device.type, DEFAULT_PASS_OVERHEAD_TOKENS)
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


def largest_training_step(
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
        return [[mine[i] for i in group] for group in batch_by_tokens([lengths[i] for i in mine], budget)]
    steps = []
    for start in range(0, max(1, len(lengths) - batch_size + 1), max(1, batch_size // 4)):
        groups = split_for_training(lengths[start : start + batch_size], budget, device)
        steps.append([[start + i for i in group] for group in groups])
    return max(steps, key=lambda groups: max(lengths[group[0]] * len(group) for group in groups))


def shard_batches(
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
    groups = [[[share[i] for i in group] for group in batch_by_tokens([lengths[i] for i in share], budget, overhead)] for share in shares]
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
    return min(budget, max(prefix_length, MAX_PASS_TOKENS))


def batch_by_tokens(lengths: Sequence[int], budget: int, overhead: int = 0) -> list[list[int]]:
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
