from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.errors import UserError
from llmft.registry import METHODS, load_task
from llmft.spec import DataRef
from llmft.task import NO_LABEL, Example, TaskData, draw_examples, per_label, subsample
from llmft.task import TestSet as ReportedSet


def pool(n_labels: int, n_each: int = 200) -> TaskData:
    rows = [Example(f"row/{i}", {"text": f"text {i}"}, i % n_labels) for i in range(n_labels * n_each)]
    return TaskData(tuple(rows), ())


def ids(examples) -> list[str]:
    return [example.id for example in examples]


def by_label(examples, n_labels: int) -> list[int]:
    counted = Counter(example.label for example in examples)
    return [counted[label] for label in range(n_labels)]


@pytest.mark.parametrize("n_labels", [2, 3, 5])
def test_both_units_give_every_label_its_share(n_labels):
    total = draw_examples(pool(n_labels), n_labels, 6 * n_labels, "total", 10, seed=0)
    each = draw_examples(pool(n_labels), n_labels, 6, "per_class", 10, seed=0)
    assert by_label(total.shots, n_labels) == [6] * n_labels
    assert ids(total.shots) == ids(each.shots)


@given(n_labels=st.integers(2, 6), k=st.integers(0, 20), n_dev=st.integers(0, 40), seed=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_any_draw_is_balanced_distinct_and_repeatable(n_labels, k, n_dev, seed):
    data = pool(n_labels, 40)
    draw = draw_examples(data, n_labels, k * n_labels, "total", n_dev, seed)
    assert by_label(draw.shots, n_labels) == [k] * n_labels
    assert len(draw.dev) == n_dev
    assert max(by_label(draw.dev, n_labels)) - min(by_label(draw.dev, n_labels)) <= 1
    assert len(set(ids(draw.shots + draw.dev))) == k * n_labels + n_dev
    assert draw == draw_examples(data, n_labels, k * n_labels, "total", n_dev, seed)


@given(n_labels=st.integers(2, 4), counts=st.tuples(st.integers(0, 30), st.integers(0, 30)), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_fewer_shots_are_the_beginning_of_more(n_labels, counts, seed):
    few, many = (draw_examples(pool(n_labels, 50), n_labels, count, "per_class", 20, seed) for count in sorted(counts))
    assert ids(many.shots)[: len(few.shots)] == ids(few.shots)
    assert many.dev == few.dev


@given(n_shots=st.integers(0, 10), counts=st.tuples(st.integers(0, 60), st.integers(0, 60)), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_unlabelled_examples_are_others_without_labels_and_fewer_are_the_first_of_more(n_shots, counts, seed):
    data = pool(2, 50)
    without = draw_examples(data, 2, n_shots, "per_class", 20, seed)
    few, many = (draw_examples(data, 2, n_shots, "per_class", 20, seed, count) for count in sorted(counts))
    assert (many.shots, many.dev) == (without.shots, without.dev) and without.unlabelled == ()
    assert len(many.unlabelled) == max(counts) and few.unlabelled == many.unlabelled[: min(counts)]
    assert len(set(ids(many.unlabelled))) == max(counts)
    assert not set(ids(many.unlabelled)) & set(ids(many.shots + many.dev))
    assert {example.label for example in many.unlabelled} <= {NO_LABEL}


def test_unlabelled_examples_are_drawn_without_looking_at_the_labels():
    lopsided = TaskData(tuple(replace(example, label=int(i % 10 == 0)) for i, example in enumerate(pool(1, 400).pool)), ())
    other = TaskData(tuple(replace(example, label=1 - example.label) for example in lopsided.pool), ())
    assert ids(draw_examples(lopsided, 2, 0, "total", 0, 1, 100).unlabelled) == ids(
        draw_examples(other, 2, 0, "total", 0, 1, 100).unlabelled
    )


def test_more_unlabelled_examples_than_there_are():
    draw_examples(pool(2, 10), 2, 4, "total", 4, 0, 12)
    with pytest.raises(UserError, match="n_unlabelled: 13 are more than the 12"):
        draw_examples(pool(2, 10), 2, 4, "total", 4, 0, 13)


def test_2_are_in_16_are_in_128_and_dev_stays():
    draws = [draw_examples(pool(2), 2, n, "total", 64, seed=3) for n in (2, 16, 128)]
    assert set(ids(draws[0].shots)) < set(ids(draws[1].shots)) < set(ids(draws[2].shots))
    assert draws[0].dev == draws[1].dev == draws[2].dev
    assert not set(ids(draws[2].shots)) & set(ids(draws[2].dev))


def test_other_seeds_draw_other_examples():
    drawn = {tuple(ids(draw_examples(pool(2), 2, 16, "total", 8, seed).shots)) for seed in range(30)}
    assert len(drawn) == 30


def test_every_row_is_drawn_equally_often():
    counted = Counter(id for seed in range(1000) for id in ids(draw_examples(pool(2, 10), 2, 4, "total", 0, seed).shots))
    assert len(counted) == 20
    assert all(140 < count < 260 for count in counted.values())  # 200 expected, deviation 12.6: nearly 5 of them


def test_a_draw_is_the_same_for_every_method(spec_of):
    from llmft.setting import settle

    drawn = {name: settle(spec_of(name)).draw for name in METHODS if name != "zero_shot"}
    assert len(drawn) > 2
    assert len({tuple(ids(draw.shots)) for draw in drawn.values()}) == 1
    assert len({tuple(ids(draw.dev)) for draw in drawn.values()}) == 1


@pytest.mark.parametrize(
    ("n_shots", "n_labels", "advice"), [(5, 2, "Use 4 or 6"), (1, 2, "Use 2 or 4"), (16, 3, "Use 15 or 18")]
)
def test_shots_that_cannot_be_balanced_are_refused_with_the_nearest_that_can(n_shots, n_labels, advice):
    with pytest.raises(UserError, match=advice) as raised:
        per_label(n_shots, "total", n_labels)
    assert str(n_shots) in str(raised.value) and "per_class" in str(raised.value)


def test_more_than_the_pool_holds_is_refused():
    draw_examples(pool(2, 10), 2, 6, "per_class", 8, seed=0)
    with pytest.raises(UserError, match="7 shots and 4 dev examples of label 0 are more than the 10"):
        draw_examples(pool(2, 10), 2, 7, "per_class", 8, seed=0)


def test_an_absent_label_is_refused():
    with pytest.raises(UserError, match="label 2 are more than the 0"):
        draw_examples(pool(2, 10), 3, 3, "total", 0, seed=0)


def grouped(counts: dict[tuple[int, str], int]) -> ReportedSet:
    rows = [
        Example(f"{label}/{group}/{i}", {"text": ""}, label, {"subcase": group})
        for (label, group), n in counts.items()
        for i in range(n)
    ]
    return ReportedSet("t", "out", tuple(rows))


@given(
    counts=st.dictionaries(st.tuples(st.integers(0, 2), st.sampled_from("abcd")), st.integers(1, 15), min_size=1),
    n=st.integers(1, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_subsample_takes_as_many_of_every_stratum_as_there_are(counts, n):
    whole = grouped(counts)
    taken = subsample(whole, n)
    found = Counter((example.label, example.groups["subcase"]) for example in taken.examples)
    assert len(taken.examples) == min(n, len(whole.examples))
    assert ids(taken.examples) == [
        id for id in ids(whole.examples) if id in set(ids(taken.examples))
    ]  # the set's order, none twice
    most = max(found.values())
    assert all(found[stratum] >= min(count, most - 1) for stratum, count in counts.items())
    assert taken == subsample(whole, n)


def test_a_subsample_of_hans_is_balanced_and_constant(rte):
    data = load_task("rte").load(DataRef(directory=rte.directory))
    for test in data.tests[1:]:
        taken = subsample(test, 100)
        assert set(Counter(example.label for example in taken.examples).values()) == {50}
        assert set(Counter(example.groups["subcase"] for example in taken.examples).values()) == {10}
        assert ids(taken.examples) == ids(subsample(test, 100).examples)
        assert set(ids(subsample(test, 40).examples)) < set(ids(taken.examples))
