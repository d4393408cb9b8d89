"""Whose turn it is, against an exhaustive search and against a machine that runs trials to their end."""

import itertools
import random
from collections import Counter
from fractions import Fraction

import pytest

from sweeps.resources.slots import ResourceRequest, trials_to_start

BIG, PAIR, ONE, HALF, THIRD = (
    ResourceRequest(4, 1, 1.0, "fsdp"),
    ResourceRequest(2, 1, 1.0, "ddp"),
    ResourceRequest(gpus=1.0),
    ResourceRequest(gpus=0.5),
    ResourceRequest(gpus=0.3333),
)
CPU, CPUS = ResourceRequest(), ResourceRequest(2, 2, 0.0, "ddp")
GPUS_OF = {BIG: 4, PAIR: 2, ONE: 1, HALF: Fraction(1, 2), THIRD: Fraction(1, 3), CPU: 0, CPUS: 0}
CPUS_OF = {BIG: 4, PAIR: 2, ONE: 1, HALF: 1, THIRD: 1, CPU: 1, CPUS: 4}
IN_ORDER = [BIG, PAIR, ONE, HALF, THIRD, CPUS, CPU]  # largest first


def fit(counts, n_cpus, n_gpus):
    return sum(CPUS_OF[s] * n for s, n in counts.items()) <= n_cpus and sum(GPUS_OF[s] * n for s, n in counts.items()) <= n_gpus


def wanted(n_cpus, n_gpus, alive):
    """The most trials of the largest slot that fit, then of the next, and so on: the lexicographic maximum, by trying everything."""
    slots = [slot for slot in IN_ORDER if slot in alive]
    options = itertools.product(*(range(alive[slot] + 1) for slot in slots))
    return dict(zip(slots, max(o for o in options if fit(dict(zip(slots, o, strict=True)), n_cpus, n_gpus)), strict=True))


@pytest.mark.parametrize("slots", [(BIG, ONE, CPU), (PAIR, HALF), (ONE, THIRD, CPUS), (PAIR, ONE, THIRD), (HALF, CPUS, CPU)])
def test_every_slot_gets_what_larger_ones_leave(slots):
    for n_cpus, n_gpus in [(8, 4), (5, 2), (2, 1), (4, 5), (3, 0)]:
        for counts in itertools.product(range(3), repeat=2 * len(slots)):
            in_flight = dict(zip(slots, counts[: len(slots)], strict=True))
            ready = dict(zip(slots, counts[len(slots) :], strict=True))
            most = wanted(n_cpus, n_gpus, {slot: in_flight[slot] + ready[slot] for slot in slots})
            alive = [slot for slot in slots if in_flight[slot] + ready[slot] and fit({slot: 1}, n_cpus, n_gpus)]
            for ahead in (0, 1, 2):
                extra = {slot: 0 if set(alive) & set(slots[: slots.index(slot)]) else ahead for slot in slots}
                expected = {slot: min(ready[slot], max(0, most[slot] + extra[slot] - in_flight[slot])) for slot in slots}
                assert trials_to_start(n_cpus, n_gpus, in_flight, ready, ahead=ahead) == expected


def test_a_limit_bounds_all_together_and_serves_what_fits_first():
    for limit in range(1, 12):
        more = trials_to_start(16, 8, {ONE: 1}, {BIG: 1, ONE: 9, CPU: 9}, limit=limit)
        assert sum(more.values()) + 1 == limit and more[BIG] == min(1, limit - 1)
        assert (more[ONE], more[CPU]) == (
            min(3, max(0, limit - 2)),
            max(0, limit - 5),
        )  # four GPUs are left, of which one is taken
    assert trials_to_start(4, 1, {}, {BIG: 3, ONE: 3}, limit=1) == {BIG: 0, ONE: 1}
    assert trials_to_start(4, 1, {ONE: 5}, {ONE: 5}, limit=3) == {ONE: 0}  # more in flight than the limit: nothing is taken back


def test_an_autoscaler_sees_that_more_is_wanted():
    assert trials_to_start(4, 0, {}, {BIG: 5, CPU: 9}) == {BIG: 0, CPU: 4}
    assert trials_to_start(4, 0, {}, {BIG: 5, CPU: 9}, ahead=1) == {BIG: 1, CPU: 5}  # nothing is kept for what fits nowhere
    assert trials_to_start(4, 0, {BIG: 1}, {BIG: 4, CPU: 9}, ahead=1) == {BIG: 0, CPU: 5}
    assert trials_to_start(9, 4, {BIG: 1}, {ONE: 5, CPU: 9}, ahead=3) == {
        BIG: 0,
        ONE: 0,
        CPU: 5,
    }  # they would take the large one's place
    assert trials_to_start(0, 0, {}, {CPU: 2}, ahead=1) == {CPU: 1}  # a cluster that starts with a head alone
    assert trials_to_start(4, 0, {}, {CPU: 9}, limit=4, ahead=1) == {CPU: 4}


@pytest.mark.parametrize(("n_cpus", "n_gpus"), [(8, 4), (6, 2), (16, 8), (3, 1)])
@pytest.mark.parametrize("limit", [None, 3])
def test_trials_that_run_to_their_end(n_cpus, n_gpus, limit):
    """What is handed out starts as soon as there is room, in any order; trials end in any order; others become ready meanwhile.

    The small ones may start first whenever they can: the worst case for the large ones.
    """
    generator = random.Random(f"{n_cpus} {n_gpus} {limit}")
    for _ in range(60):
        slots = [slot for slot in generator.sample(IN_ORDER, 3) if fit({slot: 1}, n_cpus, n_gpus)]
        if not slots:
            continue
        ready = Counter({slot: generator.randint(0, 6) for slot in slots})
        later = [generator.choice(slots) for _ in range(generator.randint(0, 12))]
        total, ended, waited = ready.total() + len(later), 0, 0
        pending, running = Counter(), Counter()
        first = max(slots, key=lambda slot: (GPUS_OF[slot], CPUS_OF[slot]))
        while ended < total:
            if later and (not (ready + pending + running).total() or generator.random() < 0.5):
                ready[later.pop()] += 1
            in_flight = pending + running
            more = trials_to_start(n_cpus, n_gpus, in_flight, +ready, limit=limit)
            for slot, n in more.items():
                assert n <= ready[slot]
                pending[slot] += n
                ready[slot] -= n
                assert fit({slot: (pending + running)[slot]}, n_cpus, n_gpus) or n == 0
            assert limit is None or (pending + running).total() <= limit
            for slot in sorted(+pending, key=lambda slot: (GPUS_OF[slot], CPUS_OF[slot])):
                while pending[slot] and fit(running + Counter([slot]), n_cpus, n_gpus):
                    pending[slot] -= 1
                    running[slot] += 1
            assert running.total(), "nothing runs although trials are left"
            waited = waited + 1 if pending[first] + ready[first] and not running[first] else 0
            assert waited <= most_small(n_cpus, n_gpus, slots)  # of small trials in flight when the large one came
            ending = generator.choice(list((+running).elements()))
            running[ending] -= 1
            ended += 1


def most_small(n_cpus, n_gpus, slots):
    return max(ResourceRequest.n_fitting(slot, n_cpus, n_gpus) for slot in slots) * len(slots)


def test_slots_add_up():
    assert (BIG.total_cpus, BIG.total_gpus, CPUS.total_cpus, THIRD.whole_gpus) == (4, 4.0, 4, Fraction(1, 3))
    assert ResourceRequest(gpus=0.4).whole_gpus == Fraction(1, 2) and ResourceRequest(gpus=0.2).n_fitting(99, 2) == 10
    assert ResourceRequest(cpus=2, gpus=0.2).n_fitting(5, 2) == 2 and CPUS.n_fitting(9, 0) == 2
    assert [str(slot) for slot in (BIG, ONE, ResourceRequest(gpus=0.25), CPU, CPUS)] == [
        "4 GPUs, fsdp", "1 GPU", "0.25 GPU", "1 CPU", "4 CPUs, ddp"
    ]  # fmt: skip
    assert str(ResourceRequest(gpus=1.0, micro_batch_tokens=1024)) == "1 GPU, passes of 1024 tokens"
