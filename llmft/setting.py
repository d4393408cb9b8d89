"""Everything that a spec names, found and checked before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from llmft import registry
from llmft.architecture import decoder_start_token, shares_prefix
from llmft.definition import TaskDefinition
from llmft.errors import UserError, unknown_name
from llmft.method import Method
from llmft.model import context_length, load_config, load_tokenizer, tuned_from
from llmft.seeds import stream
from llmft.spec import DataRef, TrialSpec
from llmft.task import Draw, Task, TaskData, TestSet, draw_examples, subsample
from llmft.tokens import EncodedTrial, LabelWords, decoder_start, encode_trial, resolve_label_words

SHOTS, DEV = "shots", "dev"  # names of these sets among a trial's encoded sets


@dataclass(frozen=True)
class Setting:
    """What a spec names; nothing of it depends on the weights.

    `start` is what a decoder of its own reads before an answer; `tuned_from` the model that this one began as, where it says so.
    """

    task: Task
    data: TaskData
    method: Method
    tests: tuple[TestSet, ...]
    draw: Draw
    words: LabelWords
    start: tuple[int, ...] = ()
    tuned_from: str | None = None


@lru_cache(maxsize=4)
def load_data(task: str, data: DataRef, definition: TaskDefinition | None = None) -> TaskData:
    """A task's rows, kept for the next trial."""
    return registry.load_task(task, definition).load(data)


def draw(spec: TrialSpec, task: Task, data: TaskData, method: Method) -> Draw:
    """The trial's examples.

    Raises:
        UserError: as `draw_examples`.
    """
    n_shots, fixed = (spec.n_shots, spec.demonstrations) if method.uses_shots else (0, ())
    return draw_examples(data, len(task.labels), n_shots, spec.shots_unit, spec.n_dev, spec.data_seed, spec.draw, fixed)


def settle(spec: TrialSpec) -> Setting:
    """Find what the spec names.

    Raises:
        UserError: something that is not there or not allowed.
    """
    task, method = registry.load_task(spec.task, spec.definition), registry.build_method(spec.method, spec.settings)
    for kind, name, known in (
        ("pattern", spec.pattern, task.patterns),
        ("verbalizer", spec.verbalizer, {"default": None, **task.verbalizers}),
    ):
        if name not in known:
            raise unknown_name(kind, name, known, where=f"task '{spec.task}'")
    if method.uses_shots and not spec.n_shots:
        raise UserError(
            f"n_shots: the method '{spec.method}' needs at least one example a label. Use method 'zero_shot' for 0 shots."
        )
    data, pattern = load_data(spec.task, spec.data, spec.definition), task.patterns[spec.pattern]
    known_tests = {test.name: test for test in data.tests}
    for name in spec.test_sets or ():
        if name not in known_tests:
            raise unknown_name("test set", name, known_tests, where=f"task '{spec.task}'")
    tests = tuple(subsample(test, spec.n_test) for test in data.tests if spec.test_sets is None or test.name in spec.test_sets)
    if method.trains:
        _check_selections(spec, {test.domain for test in tests})
    drawn = draw(spec, task, data, method)
    config = load_config(spec.model)
    if spec.max_length is not None and spec.max_length > context_length(config):
        raise UserError(f"max_length: {spec.max_length} is more than this model's context of {context_length(config)} tokens.")
    words = task.verbalizers[pattern.verbalizer if spec.verbalizer == "default" else spec.verbalizer]
    tokenizer, token = load_tokenizer(spec.model), decoder_start_token(config, spec.model.name)
    start = () if token is None else decoder_start(tokenizer, token)
    resolved = resolve_label_words(tokenizer, pattern, words, data.pool[0].fields, in_decoder=bool(start))
    return Setting(task, data, method, tests, drawn, resolved, start, tuned_from(spec.model))


def _check_selections(spec: TrialSpec, domains: set[str]) -> None:
    """A selection that cannot be made would leave a number out without a word."""
    if "none" in spec.selections:
        raise UserError(f"selections: 'none' is for methods that train nothing; '{spec.method}' does. Use last or best_dev.")
    for oracle, domain in (("best_in_domain", "in"), ("best_out_of_domain", "out")):
        if oracle in spec.selections and domain not in domains:
            raise UserError(f"selections: '{oracle}' needs a test set of that domain, and test_sets names none.")


def encode_prompts(spec: TrialSpec, setting: Setting) -> EncodedTrial:
    """Every prompt of the trial as token ids.

    Raises:
        TrialFailure: a query does not fit (QUERY_TOO_LONG).
    """
    sets = {test.name: test.examples for test in setting.tests}
    if setting.draw.dev:
        sets[DEV] = setting.draw.dev
    if setting.method.trains:
        sets[SHOTS] = setting.draw.shots
    config = load_config(spec.model)
    return encode_trial(
        load_tokenizer(spec.model),
        setting.task.patterns[spec.pattern],
        setting.words,
        spec.separator,
        setting.method.context(setting.draw.shots),
        sets,
        spec.max_length or context_length(config),
        stream(spec.order_seed, "demonstrations"),
        spec.instruction,
        setting.start,
        shares_prefix(config),
    )
