"""Everything that a spec names, found and checked before any weight is loaded, and the trial's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llmft.config import GenerationSpec, ModelRef, Pattern, TrialSpec
from llmft.data import Draw, Example, Task, TaskData, TestSet, draw_examples, draw_unlabelled, subsample
from llmft.errors import UserError, unknown_name
from llmft.methods import Method, Rationales, Recipe, TrialContext, build_method, check_kinds
from llmft.models import context_length, decoder_start_token, load_config, load_tokenizer, shares_prefix, tuned_from
from llmft.prompting import (
    CONTENT_FREE,
    DEV,
    INPUTS,
    SHOTS,
    Decoding,
    EncodedTrial,
    LabelWords,
    RationaleDecoding,
    decoder_start,
    encode,
    encode_trial,
    resolve_label_words,
)
from llmft.seeds import derive, stream
from llmft.tasks import load_data, load_task
from llmft.training import check_blocks
from llmft.trial.mixture import Part, draw_mixture, with_mixture


@dataclass(frozen=True)
class PreparedTrial:
    """What a spec names; nothing of it depends on the weights.

    A task has either label words, `words`, or generates text by `decoding`. `recipe` is what the method asks of the trial; `start` is
    what a decoder of its own reads before an answer; `tuned_from` the model that this one began as, where it says so; `mixture` what
    is trained on of other tasks; `reasoning` how rationales are generated, where the method has some.
    """

    task: Task
    data: TaskData
    method: Method
    recipe: Recipe
    tests: tuple[TestSet, ...]
    draw: Draw
    words: LabelWords | None
    start: tuple[int, ...] = ()
    tuned_from: str | None = None
    decoding: Decoding | None = None
    mixture: tuple[Part, ...] = ()
    reasoning: RationaleDecoding | None = None

    @property
    def training_examples(self) -> tuple[Example, ...]:
        """What is trained on of the trial's own task; `TeacherPrompt.examples` are positions in it."""
        return self.draw.unlabelled + self.recipe.trained_shots


def prepare_trial(spec: TrialSpec) -> PreparedTrial:
    """Find what the spec names, and check that it goes together.

    Raises:
        UserError: something that is not there or not allowed.
    """
    task, method = load_task(spec.task, spec.definition), build_method(spec.method, spec.settings)
    check_compatible(spec, task, method)
    data = load_data(spec.task, spec.data, spec.definition)
    tests = select_tests(spec, data, method)
    draw = draw_for_trial(spec, task, data, method)
    tokenizer, start = load_tokenizer(spec.model), _start(spec.model)
    _check_lengths(spec, start)
    words_behind = partial(_label_words, spec, task, data, tokenizer, bool(start))
    recipe = method.recipe(TrialContext(spec, draw, tokenizer, words_behind))
    if recipe.teacher:
        draw = draw_unlabelled(data, draw, recipe.teacher.n_unlabelled, spec.data_seed)
    rationales = recipe.prompting.rationales
    words = words_behind(rationales.marker if rationales else "")
    if words and spec.teacher:
        words = replace(words, n_known=_n_shared_tokens(spec, [task.patterns[spec.pattern].render(shot.fields) for shot in draw.shots]))
    decoding = reasoning = None
    if spec.generation:
        stop = (spec.separator,) if spec.generation.stop is None else spec.generation.stop
        decoding = Decoding(spec.generation, tokenizer, stop, derive(spec.dropout_seed, "generation"), task.metric)
    if words and rationales:
        reasoning = _rationale_decoding(spec, rationales, task.patterns[spec.pattern], draw, tokenizer, words, bool(start))
    mixture = _mixture(spec, recipe, tokenizer, bool(start))
    return PreparedTrial(
        task, data, method, recipe, tests, draw, words, start, tuned_from(spec.model), decoding, mixture, reasoning
    )  # fmt: skip


def check_compatible(spec: TrialSpec, task: Task, method: Method) -> None:
    """Check that the spec has what its task and its method need, and nothing that they cannot use.

    Raises:
        UserError: it does not.
    """
    check_kinds(spec.method, spec.task, task.kind)
    if (task.kind == "generation") != (spec.generation is not None):
        fix = "leave generation out" if spec.generation else "give a GenerationSpec"
        raise UserError(f"generation: the task '{spec.task}' is {task.kind}; {fix}.")
    for kind, name, known in (
        ("pattern", spec.pattern, task.patterns),
        ("verbalizer", spec.verbalizer, {"default": None, **task.verbalizers}),
    ):
        if name not in known:
            raise unknown_name(kind, name, known, where=f"task '{spec.task}'")
    if bool(spec.mixture) != method.uses_mixture:
        fix = "name the tasks that it shall train on" if method.uses_mixture else "which trains on its own task alone; remove it"
        raise UserError(f"mixture: is for methods that mix tasks, and this one is '{spec.method}'; {fix}.")
    if spec.teacher is not None and not method.uses_teacher:
        raise UserError(f"teacher: the method '{spec.method}' learns from no teacher; remove it.")
    if method.uses_shots and not spec.n_shots and not method.uses_mixture:
        raise UserError(f"n_shots: the method '{spec.method}' needs at least one example a label. Use method 'zero_shot' for 0 shots.")
    if method.trains and spec.train.layer_decay < 1:
        check_blocks(spec.model)


def select_tests(spec: TrialSpec, data: TaskData, method: Method) -> tuple[TestSet, ...]:
    """Select the spec's test sets, of which each selection of a checkpoint must have what it needs.

    Raises:
        UserError: a set is not known, or a selection cannot be made.
    """
    known_tests = {test.name: test for test in data.tests}
    for name in spec.test_sets or ():
        if name not in known_tests:
            raise unknown_name("test set", name, known_tests, where=f"task '{spec.task}'")
    tests = tuple(subsample(test, spec.n_test) for test in data.tests if spec.test_sets is None or test.name in spec.test_sets)
    if method.trains:
        _check_selections(spec, {test.domain for test in tests})
    return tests


def draw_for_trial(spec: TrialSpec, task: Task, data: TaskData, method: Method) -> Draw:
    """Draw the trial's shots and dev examples.

    Raises:
        UserError: as `draw_examples`.
    """
    n_shots, fixed = (spec.n_shots, spec.demonstrations) if method.uses_shots else (0, ())
    return draw_examples(data, len(task.labels), n_shots, spec.shots_unit, spec.n_dev, spec.data_seed, spec.draw, fixed, task.labels)


def _check_lengths(spec: TrialSpec, start: tuple[int, ...]) -> None:
    context = context_length(load_config(spec.model))
    if spec.max_length is not None and spec.max_length > context:
        raise UserError(f"max_length: {spec.max_length} is more than this model's context of {context} tokens.")
    if spec.generation and start and len(start) + spec.generation.max_new_tokens - 1 > (most := spec.max_length or context):
        raise UserError(f"generation.max_new_tokens: at most {most + 1 - len(start)} fit this model's decoder or max_length.")


def _label_words(spec: TrialSpec, task: Task, data: TaskData, tokenizer: Any, in_decoder: bool, marker: str) -> LabelWords | None:
    """The task's label words behind the pattern and a rationale's `marker`; None where text is generated."""
    if spec.generation:
        return None
    pattern = task.patterns[spec.pattern]
    texts = task.verbalizers[pattern.verbalizer if spec.verbalizer == "default" else spec.verbalizer]
    before = replace(pattern, template=pattern.template + marker)
    return resolve_label_words(tokenizer, before, texts, data.pool[0].fields, in_decoder=in_decoder)


def _rationale_decoding(
    spec: TrialSpec, rationales: Rationales, pattern: Pattern, draw: Draw, tokenizer: Any, words: LabelWords, in_decoder: bool
) -> RationaleDecoding:
    if in_decoder:
        raise UserError(
            f"model: {spec.model.name} has an encoder; rationales are said by causal models alone. Use one, or rationales: false."
        )
    for example in draw.shots:
        if not example.rationale:
            raise UserError(
                f"rationales: the example {example.id} of '{spec.task}' has none. Use rationales: false, or a task of your own whose "
                "definition names the column, as in rationale: why."
            )
    context = context_length(load_config(spec.model))
    stop = tuple(dict.fromkeys(filter(None, [rationales.marker, spec.separator])))
    decoding = Decoding(GenerationSpec(max_new_tokens=rationales.n_tokens), tokenizer, stop, 0, "")
    return RationaleDecoding(rationales.marker, pattern, decoding, min(spec.max_length or context, context) - words.longest + 1)


def _mixture(spec: TrialSpec, recipe: Recipe, tokenizer: Any, in_decoder: bool) -> tuple[Part, ...]:
    if recipe.mixture is None:
        return ()
    pools = {name: load_data(name, other.data, other.definition) for name, other in sorted(spec.mixture.items())}
    return draw_mixture(spec, recipe.mixture, pools, tokenizer, in_decoder)


def _start(ref: ModelRef) -> tuple[int, ...]:
    """What the model's decoder reads before an answer; empty for a causal model."""
    token = decoder_start_token(load_config(ref), ref.name)
    return () if token is None else decoder_start(load_tokenizer(ref), token)


def _n_shared_tokens(spec: TrialSpec, prompts: Sequence[str]) -> int:
    """How many tokens of the vocabulary the model and its teacher both have; they must split a text into the same ones."""
    ours, theirs = load_tokenizer(spec.model), load_tokenizer(spec.teacher)
    if ours.get_vocab() != theirs.get_vocab() or encode(ours, prompts) != encode(theirs, prompts):
        raise UserError(
            f"teacher: the tokenizers of {spec.teacher.name} and {spec.model.name} differ, so what one says is not in the other's "
            "words. Choose two models of one family."
        )
    return min(load_config(ref).vocab_size for ref in (spec.model, spec.teacher))


def _check_selections(spec: TrialSpec, domains: set[str]) -> None:
    """A selection that cannot be made would leave a number out without a word."""
    if "none" in spec.selections:
        raise UserError(f"selections: 'none' is for methods that train nothing; '{spec.method}' does. Use last or best_dev.")
    for oracle, domain in (("best_in_domain", "in"), ("best_out_of_domain", "out")):
        if oracle in spec.selections and domain not in domains:
            raise UserError(f"selections: '{oracle}' needs a test set of that domain, and test_sets names none.")


def encode_prompts(spec: TrialSpec, trial: PreparedTrial, teacher_texts: Mapping[str, str] | None = None) -> EncodedTrial:
    """Encode every prompt of the trial as token ids.

    Args:
        teacher_texts: what a teacher answered, by the examples' ids, in the place of their references.

    Raises:
        TrialFailure: a query does not fit (QUERY_TOO_LONG).
    """
    prompting, sets = trial.recipe.prompting, {test.name: test.examples for test in trial.tests}
    if trial.draw.dev:
        sets[DEV] = trial.draw.dev
    if trial.method.trains and (examples := _with_texts(trial.training_examples, teacher_texts or {})):
        sets[SHOTS] = examples
    if prompting.calibration_texts:
        fields = trial.data.pool[0].fields
        sets[CONTENT_FREE] = tuple(
            Example(f"{CONTENT_FREE}/{number}", dict.fromkeys(fields, text), label=0)
            for number, text in enumerate(prompting.calibration_texts)
        )
    bare = [SHOTS] if prompting.train_without_demonstrations else []
    encoded = _encode(spec, trial, spec.model, prompting.demonstrations, sets, bare, prompting.n_virtual_tokens)
    context = context_length(load_config(spec.model))
    return with_mixture(
        encoded, trial.mixture, load_tokenizer(spec.model), spec.separator, min(spec.max_length or context, context), trial.start
    )


def _with_texts(examples: tuple[Example, ...], texts: Mapping[str, str]) -> tuple[Example, ...]:
    """The examples with a teacher's texts as references; once there are any, those without either are left out."""
    if not texts:
        return examples
    answered = (replace(example, references=(texts[example.id],)) if example.id in texts else example for example in examples)
    return tuple(example for example in answered if example.references)


def encode_teacher_prompts(spec: TrialSpec, trial: PreparedTrial) -> list[EncodedTrial]:
    """Encode the teacher prompts: the `INPUTS`, and in the first the dev examples as well, which tell how good a teacher it is.

    Where there are several rounds they leave room for the method's virtual tokens, which a student puts in front when it reads them
    itself; so all rounds have the same demonstrations.

    Raises:
        TrialFailure: as `encode_prompts`.
    """
    teacher, examples, ref = trial.recipe.teacher, trial.training_examples, spec.teacher or spec.model
    if teacher is None:
        return []
    n_virtual_tokens, encoded = trial.recipe.prompting.n_virtual_tokens if teacher.n_rounds > 1 else 0, []
    for number, prompt in enumerate(teacher.prompts):
        dev = () if number or teacher.teacher_is_model else trial.draw.dev
        sets = {INPUTS: tuple(examples[i] for i in prompt.examples), DEV: dev}
        sets = {name: members for name, members in sets.items() if members}
        encoded.append(_encode(spec, trial, ref, prompt.demonstrations, sets, (), n_virtual_tokens, prompt.instruction))
    return encoded


def encode_dev_alone(spec: TrialSpec, trial: PreparedTrial) -> EncodedTrial:
    """Encode the dev examples for the teacher, without demonstrations and instruction of a teacher prompt."""
    return _encode(spec, trial, spec.teacher or spec.model, (), {DEV: trial.draw.dev})


def _encode(
    spec: TrialSpec,
    trial: PreparedTrial,
    model: ModelRef,
    demonstrations: Sequence[Example],
    sets: Mapping[str, Sequence[Example]],
    bare: Sequence[str] = (),
    n_virtual_tokens: int = 0,
    instruction: str = "",
) -> EncodedTrial:
    config = load_config(model)
    context = context_length(config)
    n_new_tokens = spec.generation.max_new_tokens if spec.generation else 0
    if trial.reasoning:
        n_new_tokens = trial.reasoning.n_new_tokens
    return encode_trial(
        load_tokenizer(model),
        trial.task.patterns[spec.pattern],
        trial.words,
        spec.separator,
        demonstrations,
        sets,
        min(spec.max_length or context, context),
        stream(spec.order_seed, "demonstrations"),
        spec.separator.join(filter(None, [spec.instruction, instruction])),
        _start(model),
        shares_prefix(config),
        bare,
        n_virtual_tokens,
        n_new_tokens=n_new_tokens,
        trained=(SHOTS,),
        marker=trial.reasoning.marker if trial.reasoning else "",
    )
