"""Everything that a spec names, found and checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmft.config import GenerationSpec, ModelRef, Pattern, TrialSpec
from llmft.data import Draw, Example, Task, TaskData, TestSet, draw_examples, draw_unlabelled, subsample
from llmft.errors import UserError, unknown_name
from llmft.methods import Method, TeacherPrompt, build_method, check_kinds
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

    A task has either label words, `words`, or generates text by `decoding`. `start` is what a decoder of its own reads before an
    answer; `tuned_from` the model that this one began as, where it says so; `mixture` what is trained on of other tasks;
    `reasoning` how rationales are said, where the method has some.
    """

    task: Task
    data: TaskData
    method: Method
    tests: tuple[TestSet, ...]
    draw: Draw
    lessons: tuple[TeacherPrompt, ...]
    words: LabelWords | None
    start: tuple[int, ...] = ()
    tuned_from: str | None = None
    decoding: Decoding | None = None
    mixture: tuple[Part, ...] = ()
    reasoning: RationaleDecoding | None = None


def draw_for_trial(spec: TrialSpec, task: Task, data: TaskData, method: Method) -> Draw:
    """The trial's examples.

    Raises:
        UserError: as `draw_examples` and `draw_unlabelled`.
    """
    n_shots, fixed = (spec.n_shots, spec.demonstrations) if method.uses_shots else (0, ())
    drawn = draw_examples(data, len(task.labels), n_shots, spec.shots_unit, spec.n_dev, spec.data_seed, spec.draw, fixed, task.labels)
    return draw_unlabelled(data, drawn, method.n_unlabelled, spec.data_seed)


def prepare_trial(spec: TrialSpec) -> PreparedTrial:
    """Find what the spec names.

    Raises:
        UserError: something that is not there or not allowed.
    """
    task, method = load_task(spec.task, spec.definition), build_method(spec.method, spec.settings)
    check_kinds(spec.method, spec.task, task.kind)
    if task.kind == "generation" and method.marker:
        raise UserError(f"method '{spec.method}': settings.rationales lead to label words, and '{spec.task}' generates text. Use false.")
    if task.kind == "generation" and method.calibration_texts:
        raise UserError(f"method '{spec.method}': settings.calibration is for label words, and '{spec.task}' generates text. Use none.")
    if (task.kind == "generation") != (spec.generation is not None):
        fix = "leave generation out" if spec.generation else "give a GenerationSpec"
        raise UserError(f"generation: the task '{spec.task}' is {task.kind}; {fix}.")
    for kind, name, known in (
        ("pattern", spec.pattern, task.patterns),
        ("verbalizer", spec.verbalizer, {"default": None, **task.verbalizers}),
    ):
        if name not in known:
            raise unknown_name(kind, name, known, where=f"task '{spec.task}'")
    if bool(spec.mixture) != bool(method.n_mixed):
        fix = "name the tasks that it shall train on" if method.n_mixed else "which trains on its own task alone; remove it"
        raise UserError(f"mixture: is for methods that mix tasks, and this one is '{spec.method}'; {fix}.")
    if method.uses_shots and not spec.n_shots and not method.n_mixed:
        raise UserError(f"n_shots: the method '{spec.method}' needs at least one example a label. Use method 'zero_shot' for 0 shots.")
    data, pattern = load_data(spec.task, spec.data, spec.definition), task.patterns[spec.pattern]
    known_tests = {test.name: test for test in data.tests}
    for name in spec.test_sets or ():
        if name not in known_tests:
            raise unknown_name("test set", name, known_tests, where=f"task '{spec.task}'")
    tests = tuple(subsample(test, spec.n_test) for test in data.tests if spec.test_sets is None or test.name in spec.test_sets)
    if method.trains:
        _check_selections(spec, {test.domain for test in tests})
        if spec.train.layer_decay < 1:
            check_blocks(spec.model)
    drawn = draw_for_trial(spec, task, data, method)
    lessons = method.lessons(drawn, stream(spec.data_seed, "lessons"))
    config = load_config(spec.model)
    if spec.max_length is not None and spec.max_length > context_length(config):
        raise UserError(f"max_length: {spec.max_length} is more than this model's context of {context_length(config)} tokens.")
    tokenizer, start = load_tokenizer(spec.model), _start(spec.model)
    if spec.generation is not None:
        if start and len(start) + spec.generation.max_new_tokens - 1 > (most := spec.max_length or context_length(config)):
            raise UserError(f"generation.max_new_tokens: at most {most + 1 - len(start)} fit this model's decoder or max_length.")
        if spec.teacher is not None:
            _check_teacher(spec, lessons)
        method.read(spec, tokenizer, None)
        stop = (spec.separator,) if spec.generation.stop is None else spec.generation.stop
        decoding = Decoding(spec.generation, tokenizer, stop, derive(spec.dropout_seed, "generation"), task.metric)
        mixture = _mixture(spec, method, tokenizer, in_decoder=bool(start))
        return PreparedTrial(task, data, method, tests, drawn, lessons, None, start, tuned_from(spec.model), decoding, mixture)
    texts = task.verbalizers[pattern.verbalizer if spec.verbalizer == "default" else spec.verbalizer]
    place = replace(pattern, template=pattern.template + method.marker)  # what a label word stands behind
    words = resolve_label_words(tokenizer, place, texts, data.pool[0].fields, in_decoder=bool(start))
    if spec.teacher is not None:
        _check_teacher(spec, lessons)
        words = replace(words, n_known=_check_words(spec, [pattern.render(example.fields) for example in drawn.shots]))
    method.read(spec, tokenizer, words)
    mixture = _mixture(spec, method, tokenizer, in_decoder=bool(start))
    reasoning = _rationale_decoding(spec, method, pattern, drawn, tokenizer, words, in_decoder=bool(start)) if method.marker else None
    return PreparedTrial(task, data, method, tests, drawn, lessons, words, start, tuned_from(spec.model), None, mixture, reasoning)


def _rationale_decoding(
    spec: TrialSpec, method: Method, pattern: Pattern, drawn: Draw, tokenizer, words: LabelWords, in_decoder: bool
) -> RationaleDecoding:
    if in_decoder:
        raise UserError(
            f"model: {spec.model.name} has an encoder; rationales are said by causal models alone. Use one, or rationales: false."
        )
    for example in drawn.shots:
        if not example.rationale:
            raise UserError(
                f"rationales: the example {example.id} of '{spec.task}' has none. Use rationales: false, or a task of your own whose "
                "definition names the column, as in rationale: why."
            )
    context = context_length(load_config(spec.model))
    stop = tuple(dict.fromkeys(filter(None, [method.marker, spec.separator])))
    decoding = Decoding(GenerationSpec(max_new_tokens=method.n_rationale_tokens), tokenizer, stop, 0, "")
    return RationaleDecoding(method.marker, pattern, decoding, min(spec.max_length or context, context) - words.longest + 1)


def _mixture(spec: TrialSpec, method: Method, tokenizer, in_decoder: bool = False) -> tuple[Part, ...]:
    if not spec.mixture:
        return ()
    pools = {name: load_data(name, other.data, other.definition) for name, other in sorted(spec.mixture.items())}
    return draw_mixture(spec, method, pools, tokenizer, in_decoder)


def _start(ref: ModelRef) -> tuple[int, ...]:
    """What the model's decoder reads before an answer; empty for a causal model."""
    token = decoder_start_token(load_config(ref), ref.name)
    return () if token is None else decoder_start(load_tokenizer(ref), token)


def _check_teacher(spec: TrialSpec, lessons: Sequence[TeacherPrompt]) -> None:
    if not lessons:
        raise UserError(f"teacher: the method '{spec.method}' learns from no teacher; remove it.")


def _check_words(spec: TrialSpec, prompts: Sequence[str]) -> int:
    """How many words the model and its teacher both know; they must split a text into the same tokens."""
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


def encode_prompts(spec: TrialSpec, setting: PreparedTrial) -> EncodedTrial:
    """Every prompt of the trial as token ids, with what a teacher has answered by then (`Method.responses`).

    Raises:
        TrialFailure: a query does not fit (QUERY_TOO_LONG).
    """
    sets, method = {test.name: test.examples for test in setting.tests}, setting.method
    if setting.draw.dev:
        sets[DEV] = setting.draw.dev
    if method.trains and (inputs := _answered(method.inputs(setting.draw), method.responses)):
        sets[SHOTS] = inputs
    if method.calibration_texts:
        fields = setting.data.pool[0].fields
        sets[CONTENT_FREE] = tuple(
            Example(f"{CONTENT_FREE}/{number}", dict.fromkeys(fields, text), label=0)
            for number, text in enumerate(method.calibration_texts)
        )
    bare = [SHOTS] if method.trains and method.trains_bare else []
    encoded = _encode(spec, setting, spec.model, method.context(setting.draw.shots), sets, bare, method.n_virtual_tokens)
    context = context_length(load_config(spec.model))
    return with_mixture(
        encoded,
        setting.mixture,
        load_tokenizer(spec.model),
        spec.separator,
        min(spec.max_length or context, context),
        setting.start,
    )


def _answered(inputs: tuple[Example, ...], responses: Mapping[str, str]) -> tuple[Example, ...]:
    """The inputs with their responses as references; once there are any, those without either are left out."""
    if not responses:
        return inputs
    answered = (replace(each, references=(responses[each.id],)) if each.id in responses else each for each in inputs)
    return tuple(example for example in answered if example.references)


def encode_teacher_prompts(spec: TrialSpec, setting: PreparedTrial) -> list[EncodedTrial]:
    """The prompts of the setting's lessons: the `INPUTS`, and in the first lesson the dev examples as well.

    Where there are several rounds they leave room for the method's virtual tokens, which a student puts in front when it reads them
    itself; so all rounds have the same demonstrations.

    Raises:
        TrialFailure: as `encode_prompts`.
    """
    method, encoded = setting.method, []
    inputs, n_virtual_tokens = method.inputs(setting.draw), method.n_virtual_tokens if method.n_rounds > 1 else 0
    for number, lesson in enumerate(setting.lessons):
        sets = {INPUTS: tuple(inputs[i] for i in lesson.inputs), DEV: () if number else setting.draw.dev}
        sets = {name: examples for name, examples in sets.items() if examples}
        ref = spec.teacher or spec.model
        encoded.append(
            _encode(spec, setting, ref, lesson.demonstrations, sets, n_virtual_tokens=n_virtual_tokens, instruction=lesson.instruction)
        )
    return encoded


def encode_alone(spec: TrialSpec, setting: PreparedTrial) -> EncodedTrial:
    """The dev examples as the teacher reads them without a lesson."""
    return _encode(spec, setting, spec.teacher or spec.model, (), {DEV: setting.draw.dev})


def _encode(
    spec: TrialSpec,
    setting: PreparedTrial,
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
    if setting.reasoning:
        n_new_tokens = setting.reasoning.n_new_tokens
    return encode_trial(
        load_tokenizer(model),
        setting.task.patterns[spec.pattern],
        setting.words,
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
        marker=setting.method.marker,
    )
