from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.config.spec import DataRef
from llmft.data.sampling import Draw, DrawRequest, draw_examples, draw_unlabelled, per_label, subsample
from llmft.data.task import NO_LABEL, Example, TaskData
from llmft.data.task import TestSet as ReportedSet
from llmft.errors import UserError
from llmft.methods._registry import METHODS
from llmft.tasks._registry import load_task


def pool(n_labels: int, n_each: int = 200) -> TaskData:
    rows = [Example(f"row/{i}", {"text": f"text {i}"}, i % n_labels) for i in range(n_labels * n_each)]
    return TaskData(tuple(rows), ())


def draw_from(data, n_labels, n_shots, unit, n_dev, seed, kind="balanced", fixed=(), names=()) -> Draw:
    return draw_examples(data, names or tuple(map(str, range(n_labels))), DrawRequest(n_shots, unit, n_dev, seed, kind, fixed))


def ids(examples) -> list[str]:
    return [example.id for example in examples]


def by_label(examples, n_labels: int) -> list[int]:
    counted = Counter(example.label for example in examples)
    return [counted[label] for label in range(n_labels)]


@pytest.mark.parametrize("n_labels", [2, 3, 5])
def test_both_units_give_every_label_its_share(n_labels):
    total = draw_from(pool(n_labels), n_labels, 6 * n_labels, "total", 10, seed=0)
    per_class = draw_from(pool(n_labels), n_labels, 6, "per_class", 10, seed=0)
    assert by_label(total.shots, n_labels) == [6] * n_labels
    assert ids(total.shots) == ids(per_class.shots)


@given(n_labels=st.integers(2, 6), k=st.integers(0, 20), n_dev=st.integers(0, 40), seed=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_any_draw_is_balanced_distinct_and_repeatable(n_labels, k, n_dev, seed):
    data = pool(n_labels, 40)
    draw = draw_from(data, n_labels, k * n_labels, "total", n_dev, seed)
    assert by_label(draw.shots, n_labels) == [k] * n_labels
    assert len(draw.dev) == n_dev
    assert max(by_label(draw.dev, n_labels)) - min(by_label(draw.dev, n_labels)) <= 1
    assert len(set(ids(draw.shots + draw.dev))) == k * n_labels + n_dev
    assert draw == draw_from(data, n_labels, k * n_labels, "total", n_dev, seed)


@given(n_labels=st.integers(2, 4), counts=st.tuples(st.integers(0, 30), st.integers(0, 30)), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_fewer_shots_are_the_beginning_of_more(n_labels, counts, seed):
    few, many = (draw_from(pool(n_labels, 50), n_labels, count, "per_class", 20, seed) for count in sorted(counts))
    assert ids(many.shots)[: len(few.shots)] == ids(few.shots)
    assert many.dev == few.dev


@given(n_shots=st.integers(0, 10), counts=st.tuples(st.integers(0, 60), st.integers(0, 60)), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_unlabelled_examples_are_others_without_labels_and_fewer_are_the_first_of_more(n_shots, counts, seed):
    data = pool(2, 50)
    without = draw_from(data, 2, n_shots, "per_class", 20, seed)
    few, many = (draw_unlabelled(data, without, count, seed) for count in sorted(counts))
    assert (many.shots, many.dev) == (without.shots, without.dev) and without.unlabelled == ()
    assert len(many.unlabelled) == max(counts) and few.unlabelled == many.unlabelled[: min(counts)]
    assert len(set(ids(many.unlabelled))) == max(counts)
    assert not set(ids(many.unlabelled)) & set(ids(many.shots + many.dev))
    assert {example.label for example in many.unlabelled} <= {NO_LABEL}


def test_unlabelled_examples_are_drawn_without_looking_at_the_labels():
    lopsided = TaskData(tuple(replace(example, label=int(i % 10 == 0)) for i, example in enumerate(pool(1, 400).pool)), ())
    other = TaskData(tuple(replace(example, label=1 - example.label) for example in lopsided.pool), ())
    none = Draw((), ())
    assert ids(draw_unlabelled(lopsided, none, 100, 1).unlabelled) == ids(draw_unlabelled(other, none, 100, 1).unlabelled)


def test_more_unlabelled_examples_than_there_are():
    drawn = draw_from(pool(2, 10), 2, 4, "total", 4, 0)
    assert len(draw_unlabelled(pool(2, 10), drawn, 12, 0).unlabelled) == 12
    with pytest.raises(UserError, match="n_unlabelled: 13 are more than the 12"):
        draw_unlabelled(pool(2, 10), drawn, 13, 0)


def test_2_are_in_16_are_in_128_and_dev_stays():
    draws = [draw_from(pool(2), 2, n, "total", 64, seed=3) for n in (2, 16, 128)]
    assert set(ids(draws[0].shots)) < set(ids(draws[1].shots)) < set(ids(draws[2].shots))
    assert draws[0].dev == draws[1].dev == draws[2].dev
    assert not set(ids(draws[2].shots)) & set(ids(draws[2].dev))


def test_other_seeds_draw_other_examples():
    drawn = {tuple(ids(draw_from(pool(2), 2, 16, "total", 8, seed).shots)) for seed in range(30)}
    assert len(drawn) == 30


def test_every_row_is_drawn_equally_often():
    counted = Counter(id for seed in range(1000) for id in ids(draw_from(pool(2, 10), 2, 4, "total", 0, seed).shots))
    assert len(counted) == 20
    assert all(140 < count < 260 for count in counted.values())  # 200 expected, deviation 12.6: nearly 5 of them


def test_a_draw_is_the_same_for_every_method(spec_of):
    from llmft.trial.preparation import prepare_trial

    drawn = {name: prepare_trial(spec_of(name)).draw for name in METHODS if name not in ("zero_shot", "sequence_distillation")}
    assert len(drawn) > 2
    assert len({tuple(ids(draw.shots)) for draw in drawn.values()}) == 1
    assert len({tuple(ids(draw.dev)) for draw in drawn.values()}) == 1


@pytest.mark.parametrize(("n_shots", "n_labels", "advice"), [(5, 2, "Use 4 or 6"), (1, 2, "Use 2 or 4"), (16, 3, "Use 15 or 18")])
def test_shots_that_cannot_be_balanced_are_refused_with_the_nearest_that_can(n_shots, n_labels, advice):
    with pytest.raises(UserError, match=advice) as raised:
        per_label(n_shots, "total", n_labels)
    assert str(n_shots) in str(raised.value) and "per_class" in str(raised.value)


def test_more_than_the_pool_holds_is_refused():
    draw_from(pool(2, 10), 2, 6, "per_class", 8, seed=0)
    with pytest.raises(UserError, match="7 shots and 4 dev examples of label '0' are more than the 10"):
        draw_from(pool(2, 10), 2, 7, "per_class", 8, seed=0)
    with pytest.raises(UserError, match="^n_shots: 11 shots of label 'no' are more than the 10 .* holds. Use fewer shots.$"):
        draw_from(pool(2, 10), 2, 11, "per_class", 0, seed=0, names=("no", "yes"))
    with pytest.raises(UserError, match="^n_dev: 11 dev examples of label 'no' are more .* holds. Use a smaller n_dev.$"):
        draw_from(pool(2, 10), 2, 0, "per_class", 22, seed=0, names=("no", "yes"))


def test_dev_is_as_balanced_as_can_be():
    assert by_label(draw_from(pool(3), 3, 0, "total", 13, seed=0).dev, 3) == [5, 4, 4]


def test_an_absent_label_is_refused():
    with pytest.raises(UserError, match="label '2' are more than the 0"):
        draw_from(pool(2, 10), 3, 3, "total", 0, seed=0)


def grouped(counts: dict[tuple[int, str], int]) -> ReportedSet:
    rows = [
        Example(f"{label}/{group}/{i}", {"text": ""}, label, {"subcase": group}) for (label, group), n in counts.items() for i in range(n)
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
    assert ids(taken.examples) == [id for id in ids(whole.examples) if id in set(ids(taken.examples))]  # the set's order, none twice
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


def test_a_random_draw_has_the_pools_shares_and_the_balanced_draws_dev():
    rows = tuple(Example(f"row/{i}", {"text": ""}, int(i % 10 == 0)) for i in range(400))  # one in ten
    data = TaskData(rows, ())
    n_rare = 0
    for seed in range(50):
        draw = draw_from(data, 2, 20, "total", 8, seed, "random")
        assert draw.dev == draw_from(data, 2, 20, "total", 8, seed).dev and by_label(draw.dev, 2) == [4, 4]
        assert ids(draw_from(data, 2, 7, "total", 8, seed, "random").shots) == ids(draw.shots)[:7]
        assert len(set(ids(draw.shots + draw.dev))) == 28
        n_rare += by_label(draw.shots, 2)[1]
    assert 60 < n_rare < 140  # about 92 of 1,000 expected
    with pytest.raises(UserError, match="393 are more than the 392"):
        draw_from(data, 2, 393, "total", 8, 0, "random")


def test_fixed_shots_are_the_same_for_every_seed_and_never_in_dev():
    data, fixed = pool(2, 10), ("row/3", "row/12", "row/1")
    draws = [draw_from(data, 2, 3, "total", 10, seed, fixed=fixed) for seed in range(20)]
    assert all(ids(draw.shots) == list(fixed) and not set(fixed) & set(ids(draw.dev)) and len(draw.dev) == 10 for draw in draws)
    assert len({tuple(ids(draw.dev)) for draw in draws}) > 1
    with pytest.raises(UserError, match="no example of the training pool has the id 'row/99'; one is 'row/0'"):
        draw_from(data, 2, 1, "total", 0, 0, fixed=("row/99",))


def test_dev_of_its_own_is_where_dev_comes_from():
    apart = tuple(Example(f"dev/{i}", {"text": ""}, i % 2) for i in range(8))
    data = TaskData(pool(2, 3).pool, (), dev_pool=apart)
    draw = draw_from(data, 2, 6, "total", 6, 0)
    assert len(draw.shots) == 6 and {id.split("/")[0] for id in ids(draw.dev)} == {"dev"} and by_label(draw.dev, 2) == [3, 3]
    with pytest.raises(UserError, match="n_dev: 5 examples of label '0' are more than the 4 that dev holds"):
        draw_from(data, 2, 6, "total", 10, 0)


def test_draws_without_labels_are_nested_and_paired():
    data = load_task("toy_text").load(DataRef())
    draws = [draw_from(data, 0, n, "total", 20, seed=3) for n in (0, 3, 17, 128)]
    for few, many in zip(draws, draws[1:], strict=False):
        assert many.shots[: len(few.shots)] == few.shots and many.dev == few.dev
    assert len(draws[-1].shots) == 128 and not {e.id for e in draws[-1].shots} & {e.id for e in draws[-1].dev}
    assert draw_from(data, 0, 17, "total", 20, seed=4).shots != draws[2].shots
    with pytest.raises(UserError, match="1190 shots and 20 dev examples are more than the 1200"):
        draw_from(data, 0, 1190, "total", 20, seed=0)


def test_a_trial_with_fixed_demonstrations_and_an_instruction(spec_of):
    from llmft.models.loading import load_tokenizer
    from llmft.trial.preparation import encode_prompts, prepare_trial

    fixed = ("toy_train/7", "toy_train/4", "toy_train/9")
    spec = spec_of("in_context", n_shots=3, demonstrations=fixed, instruction="Read {this} first.", n_test=4, separator=" ## ")
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    assert tuple(ids(setting.draw.shots)) == fixed and sorted(ids(encoded.demonstrations)) == sorted(fixed)
    text = load_tokenizer(spec.model).decode(encoded.prefix, skip_special_tokens=True)
    pattern, words = setting.task.patterns["minimal"], setting.words.texts
    shown = [pattern.render_labelled(example.fields, words[example.label]) for example in encoded.demonstrations]
    assert text.startswith(" ## ".join(["Read {this} first.", *shown, ""]).rstrip())
