"""Everything that a spec names, found and checked before any weight is loaded, and the trial's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmft.config import GenerationSpec, Pattern, TrialSpec
from llmft.data import Draw, DrawRequest, Example, Task, TaskData, TestSet, draw_examples, draw_unlabelled, subsample
from llmft.errors import UserError, unknown_name
from llmft.methods import Method, Rationales, Recipe, TrialContext, build_method, check_kinds
from llmft.models import ModelInfo, read_model_info
from llmft.prompting import (
    CONTENT_FREE,
    DEV,
    INPUTS,
    SHOTS,
    Decoding,
    EncodedTrial,
    LabelWords,
    PromptEncoder,
    RationaleDecoding,
    encode,
    resolve_label_words,
)
from llmft.seeds import derive, stream
from llmft.tasks import load_data, load_task
from llmft.training import check_blocks
from llmft.trial.mixture import Part, draw_mixture, with_mixture


@dataclass(frozen=True)
class PreparedTrial:
    """What a spec names; nothing of it depends on the weights.

    A task has either label words, `words`, or generates text by `decoding`. `recipe` is what the method asks of the trial;
    `teacher_info` is of the model itself where no other is named; `mixture` what is trained on of other tasks;
    `reasoning` how rationales are generated, where the method has some.
    """

    task: Task
    data: TaskData
    method: Method
    recipe: Recipe
    tests: tuple[TestSet, ...]
    draw: Draw
    words: LabelWords | None
    model_info: ModelInfo
    teacher_info: ModelInfo
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
    info = read_model_info(spec.model)
    teacher_info = info if spec.teacher is None else read_model_info(spec.teacher)
    _check_lengths(spec, info)
    words_behind = partial(_label_words, spec, task, data, info)
    recipe = method.recipe(TrialContext(spec, draw, info.tokenizer, words_behind))
    if recipe.teacher:
        draw = draw_unlabelled(data, draw, recipe.teacher.n_unlabelled, spec.data_seed)
    rationales = recipe.prompting.rationales
    words = words_behind(rationales.marker if rationales else "")
    if words and spec.teacher:
        prompts = [task.patterns[spec.pattern].render(shot.fields) for shot in draw.shots]
        words = replace(words, n_known=_n_shared_tokens(info, teacher_info, prompts))
    decoding = reasoning = None
    if spec.generation:
        stop = (spec.separator,) if spec.generation.stop is None else spec.generation.stop
        decoding = Decoding(spec.generation, info.tokenizer, stop, derive(spec.dropout_seed, "generation"), task.metric)
    if words and rationales:
        reasoning = _rationale_decoding(spec, rationales, task.patterns[spec.pattern], draw, info, words)
    mixture = _mixture(spec, recipe, info)
    return PreparedTrial(
        task, data, method, recipe, tests, draw, words, info, teacher_info, decoding, mixture, reasoning
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
    return draw_examples(data, task.labels, DrawRequest(n_shots, spec.shots_unit, spec.n_dev, spec.data_seed, spec.draw, fixed))


def _check_lengths(spec: TrialSpec, info: ModelInfo) -> None:
    if spec.max_length is not None and spec.max_length > info.context_length:
        raise UserError(f"max_length: {spec.max_length} is more than this model's context of {info.context_length} tokens.")
    n_start, most = len(info.decoder_prefix), info.max_length(spec.max_length)
    if spec.generation and n_start and n_start + spec.generation.max_new_tokens - 1 > most:
        raise UserError(f"generation.max_new_tokens: at most {most + 1 - n_start} fit this model's decoder or max_length.")


def _label_words(spec: TrialSpec, task: Task, data: TaskData, info: ModelInfo, marker: str) -> LabelWords | None:
    """The task's label words behind the pattern and a rationale's `marker`; None where text is generated."""
    if spec.generation:
        return None
    pattern = task.patterns[spec.pattern]
    texts = task.verbalizers[pattern.verbalizer if spec.verbalizer == "default" else spec.verbalizer]
    before = pattern.model_copy(update={"template": pattern.template + marker})
    return resolve_label_words(info.tokenizer, before, texts, data.pool[0].fields, info.is_encoder_decoder)


def _rationale_decoding(
    spec: TrialSpec, rationales: Rationales, pattern: Pattern, draw: Draw, info: ModelInfo, words: LabelWords
) -> RationaleDecoding:
    if info.is_encoder_decoder:
        raise UserError(
            f"model: {spec.model.name} has an encoder; rationales are said by causal models alone. Use one, or rationales: false."
        )
    for example in draw.shots:
        if not example.rationale:
            raise UserError(
                f"rationales: the example {example.id} of '{spec.task}' has none. Use rationales: false, or a task of your own whose "
                "definition names the column, as in rationale: why."
            )
    stop = tuple(dict.fromkeys(filter(None, [rationales.marker, spec.separator])))
    decoding = Decoding(GenerationSpec(max_new_tokens=rationales.n_tokens), info.tokenizer, stop, 0, "")
    return RationaleDecoding(rationales.marker, pattern, decoding, info.max_length(spec.max_length) - words.longest + 1)


def _mixture(spec: TrialSpec, recipe: Recipe, info: ModelInfo) -> tuple[Part, ...]:
    if recipe.mixture is None:
        return ()
    pools = {name: load_data(name, other.data, other.definition) for name, other in sorted(spec.mixture.items())}
    return draw_mixture(spec, recipe.mixture, pools, info)


def _n_shared_tokens(ours: ModelInfo, theirs: ModelInfo, prompts: Sequence[str]) -> int:
    """How many tokens of the vocabulary the model and its teacher both have; they must split a text into the same ones."""
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab() or encode(ours.tokenizer, prompts) != encode(theirs.tokenizer, prompts):
        raise UserError(
            f"teacher: the tokenizers of {theirs.ref.name} and {ours.ref.name} differ, so what one says is not in the other's "
            "words. Choose two models of one family."
        )
    return min(ours.vocab_size, theirs.vocab_size)


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
    encoder = _prompt_encoder(spec, trial, trial.model_info, n_virtual_tokens=prompting.n_virtual_tokens)
    alone = (SHOTS,) if prompting.train_without_demonstrations else ()
    encoded = encoder.encode(prompting.demonstrations, sets, stream(spec.order_seed, "demonstrations"), alone)
    return with_mixture(encoded, trial.mixture, encoder)


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
    teacher, examples = trial.recipe.teacher, trial.training_examples
    if teacher is None:
        return []
    n_virtual_tokens, encoded = trial.recipe.prompting.n_virtual_tokens if teacher.n_rounds > 1 else 0, []
    for number, prompt in enumerate(teacher.prompts):
        dev = () if number or teacher.teacher_is_model else trial.draw.dev
        sets = {INPUTS: tuple(examples[i] for i in prompt.examples), DEV: dev}
        sets = {name: members for name, members in sets.items() if members}
        encoder = _prompt_encoder(spec, trial, trial.teacher_info, prompt.instruction, n_virtual_tokens)
        encoded.append(encoder.encode(prompt.demonstrations, sets, stream(spec.order_seed, "demonstrations")))
    return encoded


def encode_dev_alone(spec: TrialSpec, trial: PreparedTrial) -> EncodedTrial:
    """Encode the dev examples for the teacher, without demonstrations and instruction of a teacher prompt."""
    return _prompt_encoder(spec, trial, trial.teacher_info).encode((), {DEV: trial.draw.dev})


def _prompt_encoder(
    spec: TrialSpec, trial: PreparedTrial, info: ModelInfo, instruction: str = "", n_virtual_tokens: int = 0
) -> PromptEncoder:
    n_new_tokens = spec.generation.max_new_tokens if spec.generation else 0
    return PromptEncoder(
        tokenizer=info.tokenizer,
        pattern=trial.task.patterns[spec.pattern],
        label_words=trial.words,
        separator=spec.separator,
        max_length=info.max_length(spec.max_length),
        instruction=spec.separator.join(filter(None, [spec.instruction, instruction])),
        decoder_prefix=info.decoder_prefix,
        share_prefix=info.can_share_prefix,
        n_virtual_tokens=n_virtual_tokens,
        n_new_tokens=trial.reasoning.n_new_tokens if trial.reasoning else n_new_tokens,
        marker=trial.reasoning.marker if trial.reasoning else "",
        trained=(SHOTS,),
    )
