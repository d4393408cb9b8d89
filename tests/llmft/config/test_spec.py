from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from llmft.config.spec import DataRef, GenerationSpec, ModelRef, TaskRef, TrainSpec, TrialSpec
from llmft.errors import error_lines, nearest

GOLDEN = TrialSpec(
    model=ModelRef(name="facebook/opt-125m", fingerprint="hub:facebook/opt-125m@main"),
    task="rte",
    data=DataRef(fingerprint="0123456789abcdef"),
    method="lora",
    settings={"r": 8, "alpha": 8, "lora_dropout": 0.0, "targets": [], "loss": "full_vocabulary"},
    n_shots=16,
    train=TrainSpec(learning_rate=2e-4),
)


def test_the_digest_of_a_known_trial_is_frozen():
    assert GOLDEN.digest == "a8ff295d54ffa1dd2c87", "every stored result would count as new: raise DIGEST_VERSION only if answers changed"


def other_value(value):
    """A valid value that differs from `value`, found by its type alone."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 if value else 0.25
        case str():
            return value + "x"
        case tuple():
            return (*value, "x")
        case dict():
            return value | {"x": TaskRef()}
        case None:
            return 8


def leaves(model: BaseModel, where: tuple[str, ...] = ()):
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*where, name))
        else:
            yield (*where, name), value


def changed(spec: TrialSpec, path: tuple[str, ...], value) -> TrialSpec:
    content = spec.model_dump()
    section = content
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return TrialSpec.model_construct(**{name: rebuild(field.annotation, content[name]) for name, field in TrialSpec.model_fields.items()})


def rebuild(annotation, value):
    """Sections become models again; values stay unvalidated, since any change must tell."""
    return annotation.model_construct(**value) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else value


# sections, and a task of the user's own: test_forgetting and test_defined change their fields, and of a teacher see below
PATHS = [path for path, _ in leaves(GOLDEN) if path not in (("forgetting",), ("definition",), ("teacher",))]
WHERE_IT_LIES = [("model", "path"), ("data", "directory"), ("data", "commits"), ("model", "name"), ("model", "revision")]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("path", WHERE_IT_LIES, ids=".".join)
def test_where_the_files_lie_and_what_the_folder_is_called_does_not_change_the_digest(path):
    assert changed(GOLDEN, path, "/elsewhere").digest == GOLDEN.digest


@pytest.mark.parametrize("path", [("model", "name"), ("model", "revision")], ids=".".join)
def test_without_a_fingerprint_the_name_tells_models_apart(path):
    nameless = changed(GOLDEN, ("model", "fingerprint"), "")
    assert changed(nameless, path, "elsewhere").digest != nameless.digest


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("path", [path for path in PATHS if path not in WHERE_IT_LIES], ids=".".join)
def test_every_other_field_changes_the_digest(path):
    assert changed(GOLDEN, path, other_value(dict(leaves(GOLDEN))[path])).digest != GOLDEN.digest


def test_how_text_is_generated_changes_the_digest():
    specs = [GenerationSpec(), GenerationSpec(max_new_tokens=65), GenerationSpec(temperature=1.0), GenerationSpec(num_beams=2)]
    specs += [GenerationSpec(temperature=1.0, top_p=0.5), GenerationSpec(temperature=1.0, top_k=5), GenerationSpec(stop=("x",))]
    digests = {GOLDEN.model_copy(update={"generation": spec}).digest for spec in [None, *specs]}
    assert len(digests) == 1 + len(specs)


def test_a_teachers_content_changes_the_digest_and_its_folder_does_not():
    def digest(**fields) -> str:
        return GOLDEN.model_copy(update={"teacher": ModelRef(**fields)}).digest

    known = digest(name="facebook/opt-6.7b", fingerprint="a")
    assert known != GOLDEN.digest
    assert digest(name="opt-6.7b", fingerprint="a", path="/elsewhere") == known != digest(name="opt-6.7b", fingerprint="b")
    assert digest(name="facebook/opt-6.7b") != digest(name="facebook/opt-2.7b")


def test_the_digest_survives_json():
    assert TrialSpec.model_validate_json(GOLDEN.model_dump_json()).digest == GOLDEN.digest


def test_with_seed_sets_every_seed():
    seeds = {name: value for name, value in GOLDEN.with_seed(7).model_dump().items() if name.endswith("_seed")}
    assert set(seeds.values()) == {7}
    assert set(seeds) == {name for name in TrialSpec.model_fields if name.endswith("_seed")}


@pytest.mark.parametrize("path", [(), ("model",), ("data",), ("train",)], ids=lambda path: ".".join(path) or "top")
def test_unknown_keys_are_refused(path):
    content = json.loads(GOLDEN.model_dump_json())
    section = content
    for name in path:
        section = section[name]
    section["shotz"] = 1
    with pytest.raises(ValidationError, match="shotz"):
        TrialSpec.model_validate_json(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_shots", "16"), ("n_shots", -1), ("n_shots", 1.5), ("shots_unit", "each"), ("task", 3), ("selections", ["best"]),
     ("precision", "fp8"), ("max_length", 4), ("n_test", 0), ("data_seed", None), ("train", {"learning_rate": "1e-5"}),
     ("train", {"learning_rate": 0}), ("train", {"epochs": 0}), ("train", {"warmup_ratio": 1.5}), ("train", {"gradient_checkpointing": 1})],
)  # fmt: skip
def test_values_of_the_wrong_type_or_range_are_refused(name, value):
    content = json.loads(GOLDEN.model_dump_json()) | {name: value}
    with pytest.raises(ValidationError, match=name):
        TrialSpec.model_validate_json(json.dumps(content))


def test_a_spec_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        GOLDEN.n_shots = 3


def test_best_dev_without_dev_examples_is_refused():
    with pytest.raises(ValidationError, match="n_dev"):
        TrialSpec(model=ModelRef(name="m"), task="rte", method="lora", n_dev=0)
    TrialSpec(model=ModelRef(name="m"), task="rte", method="lora", n_dev=0, selections=("last",))


def test_a_trial_with_nothing_to_score_is_refused():
    with pytest.raises(ValidationError, match="nothing to score"):
        TrialSpec(model=ModelRef(name="m"), task="rte", method="lora", n_dev=0, selections=("last",), test_sets=())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value):
    with pytest.raises(ValidationError, match="finite"):
        TrainSpec(learning_rate=value)


def line(changed: dict, allowed=None) -> str:
    with pytest.raises(ValidationError) as raised:
        TrialSpec.model_validate_json(json.dumps(json.loads(GOLDEN.model_dump_json()) | changed))
    return error_lines(raised.value, "plan.yaml", allowed)


def test_an_unknown_key_is_answered_with_the_nearest_one():
    allowed = {"": TrialSpec.model_fields, "train": TrainSpec.model_fields}
    said = line({"n_shot": 3, "train": {"learning_rat": 1.0}}, allowed)
    assert said.startswith("plan.yaml: ") and "\n" not in said
    assert "unknown key 'n_shot'. Did you mean 'n_shots'?" in said
    assert "unknown key 'train.learning_rat'. Did you mean 'learning_rate'?" in said
    assert "warmup_ratio" in said  # the keys of the section


@pytest.mark.parametrize(("got", "meant"), [("lr", "learning_rate"), ("rank", "r"), ("rslor", "rslora"), ("alhpa", "alpha"), ("x", None)])
def test_the_nearest_name_is_an_abbreviation_or_alike(got, meant):
    assert nearest(got, ["dora", "r", "rslora", "alpha", "learning_rate"]) == meant


def test_a_wrong_entry_of_a_list_is_told_alone():
    """pydantic also complains that the list, without it, is too short."""
    assert line({"selections": ["best"]}).startswith("plan.yaml: selections.0: must be 'none', 'last', 'best_dev'")
    assert ";" not in line({"selections": ["best"]})


def test_wrong_kinds_of_value_are_told_in_the_words_of_yaml():
    assert line({"test_sets": "rte"}) == "plan.yaml: test_sets: must be a list, as in [rte]"
    assert line({"train": [1e-3]}) == "plan.yaml: train: must be a mapping, as in {name: value} (got [0.001])"


def test_nothing_near_is_no_suggestion():
    said = line({"zzzzzz": 3}, {"": TrialSpec.model_fields})
    assert "unknown key 'zzzzzz'" in said and "Did you mean" not in said


def test_a_wrong_value_is_named_with_what_was_got():
    said = line({"n_shots": -2, "precision": "fp8"})
    assert "n_shots: " in said and "(got -2)" in said
    assert "precision: " in said and "(got 'fp8')" in said and "'bf16'" in said


def test_our_own_rules_are_told_without_pydantics_words():
    assert line({"n_dev": 0}) == ("plan.yaml: selection 'best_dev' needs dev examples: set n_dev above 0, or selections to ['last']")
