"""One trial: a spec in, a record out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from llmft.config import TrialSpec
from llmft.errors import UserError
from llmft.evaluation import Evaluator
from llmft.methods import Method
from llmft.models import AdaptedModel, borrow_model, check_bitsandbytes
from llmft.prompting import DEV, EncodedTrial
from llmft.records import Measure
from llmft.runtime import Runtime, choose_device
from llmft.seeds import derive
from llmft.training import Checkpoint, TrainingResult, check_optimizer, train
from llmft.trial.cost import CostMeter, tokens_per_query
from llmft.trial.distillation import Teaching, refresh_targets, run_teacher
from llmft.trial.failures import run_attempts, suggest_smaller_passes
from llmft.trial.forgetting import check_alone, check_forgetting, measure, measure_base, pair
from llmft.trial.preparation import PreparedTrial, encode_prompts, encode_teacher_prompts, prepare_trial
from llmft.trial.result import TrialResult, finished_record, predictions_file
from llmft.trial.weights import gather_weights


def run_trial(spec: TrialSpec, runtime: Runtime = Runtime()) -> TrialResult:
    """Adapt one model to one task once, and say how it did in and out of domain.

    A trial that fails is a record with a typed cause. One that runs out of memory runs again from its start with smaller forward
    passes, which changes no answer, until it fits or every pass is a single query.

    Raises:
        TrialFailure: only in a group of processes, for what one of them may have met alone (no memory, a file that is not there, a
            crash): the others wait for it, so whoever started the group must end it. `OutOfMemory` says what to try next.
    """
    return run_attempts(_run, spec, runtime)


def _run(spec: TrialSpec, runtime: Runtime, result: TrainingResult, began: float) -> TrialResult:
    trial, device = prepare_trial(spec), choose_device(runtime.device)
    method, domains = trial.method, {test.name: test.domain for test in trial.tests}
    _check_machine(spec, method, device)
    _check_group(spec, method, runtime)
    meter = CostMeter(device, began)
    with meter.uncounted():  # all trials of a model share it
        before = _measure_base(spec, method, runtime, device)
    encoded, prompts, teaching = _teach(spec, trial, runtime)
    with borrow_model(
        spec.model,
        spec.precision,
        device,
        spec.train.dropout if method.trains else None,
        copied=method.trains,
        kept=runtime.world_size == 1,  # a process of a group is started for one trial
        base_weights=method.base_weights,
    ) as model:
        meter.count_parameters(model.network)
        if method.trains:
            method.prepare(model, len(trial.task.labels), torch.Generator().manual_seed(derive(spec.init_seed, "init")))
        meter.count_trainable(model.network)
        adapted = AdaptedModel(method, model)
        module, evaluator = runtime.wrap(adapted), Evaluator(adapted, encoded, trial.words, runtime, trial.decoding, trial.reasoning)
        with suggest_smaller_passes(spec, [encoded, *prompts], runtime):
            with meter.timed("train_s" if method.trains else "evaluate_s"):
                if method.trains:
                    refresh = partial(refresh_targets, adapted, trial, prompts, runtime, teaching)
                    train(spec, trial.recipe, module, evaluator, domains, result, refresh)
                else:
                    _score(evaluator, domains, result)
            with meter.timed("forgetting_s"):
                after = measure(adapted, spec.model, spec.forgetting, runtime) if spec.forgetting and method.trains else before
        if method.trains:
            result.virtual_tokens = method.finalize(adapted)
        weights = gather_weights(model, runtime) if method.trains and runtime.keep_weights else None
        cost = meter.cost(model.network, result, evaluator, teaching.teacher, runtime, tokens_per_query(encoded, domains))
    record = finished_record(spec, trial, encoded, result, cost, teaching.teacher)
    record = record.model_copy(update={"forgetting": pair(before, after)})
    return TrialResult(record, predictions_file(trial, result), weights, teaching.responses)


def check_spec(spec: TrialSpec, here: bool = True) -> None:
    """Find every mistake that can be found without the weights.

    Args:
        here: whether the trial will run on this machine, so that it must have what the trial needs.

    Raises:
        UserError: one line that says what, where, what is allowed and how to mend it.
    """
    method = prepare_trial(spec).method
    if here:
        _check_machine(spec, method, choose_device(None))
    check_forgetting(spec)


def _check_machine(spec: TrialSpec, method: Method, device: torch.device) -> None:
    if method.base_weights == "nf4":
        check_bitsandbytes(f"method '{spec.method}'")
    if method.trains:
        check_optimizer(spec.train, device)
    if spec.precision == "fp16" and device.type != "cuda":
        raise UserError(f"precision: fp16 needs a CUDA device, and this is {device.type}. Use fp32 or bf16.")


def _check_group(spec: TrialSpec, method: Method, runtime: Runtime) -> None:
    """Refuse what only one process can do."""
    if method.base_weights == "nf4" and runtime.world_size > 1:
        raise UserError(f"method '{spec.method}': a base in 4 bits is not trained by several processes. Use one GPU a trial.")
    check_alone(spec, runtime)


def _measure_base(spec: TrialSpec, method: Method, runtime: Runtime, device: torch.device) -> list[Measure]:
    """What the base model can do, where forgetting is measured."""
    if spec.forgetting is None or method.has_own_head:
        return []
    return measure_base(spec, spec.forgetting, runtime, device)


def _teach(spec: TrialSpec, trial: PreparedTrial, runtime: Runtime) -> tuple[EncodedTrial, list[EncodedTrial], Teaching]:
    """The trial's prompts, those of the teacher that are read again during the training, and what a teacher says where there is one."""
    encoded, prompts = encode_prompts(spec, trial), encode_teacher_prompts(spec, trial)
    with suggest_smaller_passes(spec, [*prompts, encoded], runtime):
        teaching = run_teacher(spec, trial, encoded, prompts, runtime)
    if teaching.texts:
        encoded = encode_prompts(spec, trial, teaching.texts)
    again = trial.recipe.teacher is not None and trial.recipe.teacher.n_rounds > 1
    return encoded, prompts if again else [], teaching


def _score(evaluator: Evaluator, domains: Mapping[str, str], result: TrainingResult) -> None:
    """Fill the result of a method that trains nothing: one 'checkpoint', the model as it is."""
    if evaluator.content_free is not None:
        result.content_free = evaluator.content_free.tolist()
    dev = evaluator.predict(DEV) if DEV in evaluator.encoded.sets else None
    result.checkpoints["none"] = Checkpoint(
        0, dev.score if dev else None, dev.loss if dev else None, predictions=evaluator.predict_all(list(domains))
    )
    result.weight_distance["none"] = 0.0
