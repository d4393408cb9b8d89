"""One trial: a spec in, a record out."""

from __future__ import annotations

import gc
import hashlib
import io
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from llmft import cost, findings, registry
from llmft.adapted import Adapted
from llmft.batches import smaller_budget
from llmft.distributed import is_lost_peer
from llmft.errors import Cause, OutOfMemory, TrialFailure, UserError, unknown_name
from llmft.evaluate import Evaluator, Predictions
from llmft.method import Method
from llmft.metrics import set_metrics
from llmft.model import borrow_model, choose_device, context_length, load_config, load_tokenizer
from llmft.record import Cost, Draws, TrialRecord
from llmft.runtime import Runtime
from llmft.seeds import derive, stream
from llmft.spec import DataRef, Selection, TrialSpec
from llmft.task import Draw, Task, TaskData, TestSet, draw_examples, subsample
from llmft.tokens import EncodedTrial, LabelWords, encode_trial, resolve_label_words
from llmft.train import DEV, SHOTS, Checkpoint, Fit, fit
from llmft.weights import gather_weights

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
"""How libraries say it that have no exception of their own for it (torch on a CPU, cuBLAS, cuDNN)."""


@dataclass(frozen=True)
class TrialResult:
    """A record and, for a finished trial, its per-example predictions as a parquet file's bytes.

    `weights` are the trained tensors of the checkpoint that is best on dev, where that is selected, else of the last, as a
    safetensors file's bytes (`llmft.weights`); None where they were not asked for, where nothing is trained, and in every process
    of a group but the first.
    """

    record: TrialRecord
    predictions: bytes | None = None
    weights: bytes | None = None


@dataclass(frozen=True)
class _Setting:
    """Everything that a spec names, found and checked; nothing of it depends on the weights."""

    task: Task
    data: TaskData
    method: Method
    tests: tuple[TestSet, ...]
    draw: Draw
    words: LabelWords


def run_trial(spec: TrialSpec, runtime: Runtime = Runtime()) -> TrialResult:
    """Adapt one model to one task once, and say how it did in and out of domain.

    A trial that fails is a record with a typed cause. One that runs out of memory runs again from its start with smaller forward
    passes, which changes no answer, until it fits or every pass is a single query.

    Raises:
        TrialFailure: only in a group of processes, for what one of them may have met alone (no memory, a file that is not there, a
            crash): the others wait for it, so whoever started the group must end it. `OutOfMemory` says what to try next.
    """
    runtime, began = runtime.started(), time.perf_counter()
    while True:
        result, smaller = Fit(), None
        try:
            return _run(spec, runtime, began, result)
        except OutOfMemory as failure:
            if runtime.world_size > 1:
                raise
            cause, message, smaller = failure.cause, failure.message, failure.smaller
        except TrialFailure as failure:
            cause, message = failure.cause, failure.message
        except Exception as error:  # a failure is a row, also one that nobody foresaw
            cause, message = _reason(error)
            if runtime.world_size > 1:
                raise TrialFailure(cause, message) from error
        if smaller is None:
            return TrialResult(_failed(spec, runtime, began, result, cause, message))
        runtime = replace(runtime, micro_batch_tokens=smaller, n_out_of_memory=runtime.n_out_of_memory + 1)
        gc.collect()  # only here: while an error is handled, its traceback holds the tensors of every frame that it came through
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reason(error: Exception) -> tuple[Cause, str]:
    if isinstance(error, UserError):
        return Cause.USER_ERROR, str(error)
    if _is_out_of_memory(error):
        return Cause.OUT_OF_MEMORY, str(error).split("\n")[0] or type(error).__name__
    if is_lost_peer(error):
        return Cause.LOST, f"another process of the group ended: {error}"
    return Cause.CRASHED, f"{type(error).__name__}: {error}"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def check_spec(spec: TrialSpec) -> None:
    """Find every mistake that can be found without the weights.

    Raises:
        UserError: one line that says what, where, what is allowed and how to mend it.
    """
    _settle(spec)
    _check_precision(spec, choose_device(None))


def _check_precision(spec: TrialSpec, device: torch.device) -> None:
    if spec.precision == "fp16" and device.type != "cuda":
        raise UserError(f"precision: fp16 needs a CUDA device, and this is {device.type}. Use fp32 or bf16.")


@lru_cache(maxsize=4)
def _load_data(task: str, data: DataRef) -> TaskData:
    return registry.load_task(task).load(data)


def _settle(spec: TrialSpec) -> _Setting:
    task, method = registry.load_task(spec.task), registry.build_method(spec.method, spec.settings)
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
    data, pattern = _load_data(spec.task, spec.data), task.patterns[spec.pattern]
    known_tests = {test.name: test for test in data.tests}
    for name in spec.test_sets or ():
        if name not in known_tests:
            raise unknown_name("test set", name, known_tests, where=f"task '{spec.task}'")
    tests = tuple(subsample(test, spec.n_test) for test in data.tests if spec.test_sets is None or test.name in spec.test_sets)
    if method.trains:
        _check_selections(spec, {test.domain for test in tests})
    draw = draw_examples(
        data, len(task.labels), spec.n_shots if method.uses_shots else 0, spec.shots_unit, spec.n_dev, spec.data_seed
    )
    config = load_config(spec.model)
    if spec.max_length is not None and spec.max_length > context_length(config):
        raise UserError(f"max_length: {spec.max_length} is more than this model's context of {context_length(config)} tokens.")
    words = task.verbalizers[pattern.verbalizer if spec.verbalizer == "default" else spec.verbalizer]
    return _Setting(
        task, data, method, tests, draw, resolve_label_words(load_tokenizer(spec.model), pattern, words, data.pool[0].fields)
    )


def _check_selections(spec: TrialSpec, domains: set[str]) -> None:
    """A selection that cannot be made would leave a number out without a word."""
    if "none" in spec.selections:
        raise UserError(f"selections: 'none' is for methods that train nothing; '{spec.method}' does. Use last or best_dev.")
    for oracle, domain in (("best_in_domain", "in"), ("best_out_of_domain", "out")):
        if oracle in spec.selections and domain not in domains:
            raise UserError(f"selections: '{oracle}' needs a test set of that domain, and test_sets names none.")


def _run(spec: TrialSpec, runtime: Runtime, began: float, result: Fit) -> TrialResult:
    setting, device = _settle(spec), choose_device(runtime.device)
    _check_precision(spec, device)
    encoded = _encode(spec, setting)
    return _adapt(spec, setting, encoded, device, runtime, began, result)


def _passes(spec: TrialSpec, encoded: EncodedTrial, runtime: Runtime) -> list[list[int]]:
    """The lengths of the longest queries that one process gets at once, by set."""
    sets = []
    for name, queries in encoded.sets.items():
        lengths = sorted((len(encoded.prefix) + len(ids) for ids in queries.suffixes), reverse=True)
        sets.append(lengths[: spec.train.batch_size if name == SHOTS else None][:: runtime.world_size])
    return sets


def _adapt(
    spec: TrialSpec,
    setting: _Setting,
    encoded: EncodedTrial,
    device: torch.device,
    runtime: Runtime,
    began: float,
    result: Fit,
) -> TrialResult:
    method, memory = setting.method, cost.PeakMemory(device)
    domains = {test.name: test.domain for test in setting.tests}
    dropout = spec.train.dropout if method.trains else None
    alone = runtime.world_size == 1  # a process of a group is started for one trial
    with borrow_model(spec.model, spec.precision, device, dropout, copied=method.trains, kept=alone) as model:
        n_parameters = sum(parameter.numel() for parameter in model.network.parameters())
        if method.trains:
            method.prepare(model, len(setting.task.labels), torch.Generator().manual_seed(derive(spec.init_seed, "init")))
        trainable = [(p.numel(), p.element_size()) for p in model.network.parameters() if p.requires_grad]
        adapted = Adapted(method, model)
        module, evaluator = runtime.wrap(adapted), Evaluator(adapted, encoded, setting.words, runtime)
        started = time.perf_counter()
        try:
            if method.trains:
                fit(spec, module, evaluator, runtime, domains, result)
            else:
                _score(evaluator, domains, result)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            smaller = smaller_budget(_passes(spec, encoded, runtime), runtime.micro_batch_tokens)
            raise OutOfMemory(_reason(error)[1], smaller) from error
        finished = time.perf_counter()
        weights = gather_weights(model, runtime) if method.trains and runtime.keep_weights else None
        spent = Cost(
            wall_s=finished - began,
            train_s=finished - started if method.trains else 0.0,
            evaluate_s=0.0 if method.trains else finished - started,
            device=cost.device_name(device),
            peak_memory_bytes=int(runtime.largest(memory.n_bytes)),
            tokens_trained=result.n_tokens,
            tokens_evaluated=evaluator.n_tokens,
            n_parameters=n_parameters,
            n_trainable_parameters=sum(n for n, _ in trainable),
            stored_bytes=sum(n * size for n, size in trainable),
            tokens_per_query=_tokens_per_query(encoded, domains),
            flops=cost.flops(n_parameters, result.n_tokens, evaluator.n_tokens),
            n_steps=result.n_steps,
            n_workers=runtime.world_size,
            micro_batch_tokens=runtime.micro_batch_tokens,
            n_out_of_memory=runtime.n_out_of_memory,
        )
    record = _record(spec, setting, encoded, result, spent)
    return TrialResult(record, _predictions_file(setting, result), weights)


def _encode(spec: TrialSpec, setting: _Setting) -> EncodedTrial:
    sets = {test.name: test.examples for test in setting.tests}
    if setting.draw.dev:
        sets[DEV] = setting.draw.dev
    if setting.method.trains:
        sets[SHOTS] = setting.draw.shots
    return encode_trial(
        load_tokenizer(spec.model),
        setting.task.patterns[spec.pattern],
        setting.words,
        spec.separator,
        setting.method.context(setting.draw.shots),
        sets,
        spec.max_length or context_length(load_config(spec.model)),
        stream(spec.order_seed, "demonstrations"),
    )


def _score(evaluator: Evaluator, domains: Mapping[str, str], result: Fit) -> None:
    """The result of a method that trains nothing: one 'checkpoint', the model as it is."""
    dev = evaluator.predict(DEV) if DEV in evaluator.encoded.sets else None
    result.checkpoints["none"] = Checkpoint(
        0, dev.accuracy if dev else None, dev.loss if dev else None, predictions=evaluator.predict_all(list(domains))
    )


def _tokens_per_query(encoded: EncodedTrial, names: Mapping[str, str]) -> float:
    lengths = [len(ids) for name in list(names) or [DEV] for ids in encoded.sets[name].suffixes]
    return len(encoded.prefix) + sum(lengths) / max(1, len(lengths))


def _record(spec: TrialSpec, setting: _Setting, encoded: EncodedTrial, result: Fit, spent: Cost) -> TrialRecord:
    labels = setting.task.labels
    metrics = {
        selection: {
            test.name: set_metrics(checkpoint.predictions[test.name], test.examples, labels, test.domain)
            for test in setting.tests
        }
        for selection, checkpoint in result.checkpoints.items()
    }
    found = findings.word_findings(setting.words)
    found += findings.prompt_findings(encoded, len(setting.method.context(setting.draw.shots)))
    found += findings.overlap_findings(setting.draw.shots + setting.draw.dev, setting.data)
    if setting.method.trains:
        found += findings.training_findings(result.first_loss, result.last_loss, result.n_steps, result.n_skipped_steps)
    found += findings.coverage_findings(setting.tests, setting.data)
    for selection, by_set in metrics.items():
        for name, numbers in by_set.items():
            found += findings.set_findings(numbers, name, selection)
    ids = [example.id for example in setting.draw.shots]
    draws = Draws(
        shots=ids,
        dev=[example.id for example in setting.draw.dev],
        demonstrations=[example.id for example in encoded.demonstrations],
        n_demonstrations_dropped=encoded.n_dropped,
        shots_hash=hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16] if ids else "",
    )
    return TrialRecord(
        digest=spec.digest,
        spec=spec,
        status="finished",
        metrics=metrics,
        **_progress(result, result.checkpoints),
        findings=found,
        draws=draws,
        cost=spent,
        provenance={
            "packages": cost.packages(),
            "data_revision": setting.data.revision,
            "label_tokens": [list(i) for i in setting.words.ids],
        },
    )


def _failed(spec: TrialSpec, runtime: Runtime, began: float, result: Fit, cause: Cause, message: str) -> TrialRecord:
    """The record of a trial that failed, with what was known until then."""
    provenance: dict[str, Any] = {"packages": cost.packages()}
    if cause is Cause.PRUNED:
        provenance["stop_below"] = {str(epoch): accuracy for epoch, accuracy in runtime.stop_below.items()}
    return TrialRecord(
        digest=spec.digest,
        spec=spec,
        status="failed",
        cause=cause,
        message=message[:2000],
        **_progress(result, spec.selections),
        cost=Cost(
            wall_s=time.perf_counter() - began,
            tokens_trained=result.n_tokens,
            n_steps=result.n_steps,
            n_workers=runtime.world_size,
            micro_batch_tokens=runtime.micro_batch_tokens,
            n_out_of_memory=runtime.n_out_of_memory,
        ),
        provenance=provenance,
    )


def _progress(result: Fit, selections: Collection[Selection]) -> dict[str, Any]:
    """The fields of a record that a training fills as it goes on."""
    chosen = {name: checkpoint for name, checkpoint in result.checkpoints.items() if name in selections}
    return {
        "dev_accuracy": {name: c.dev_accuracy for name, c in chosen.items() if c.dev_accuracy is not None},
        "dev_loss": {name: c.dev_loss for name, c in chosen.items() if c.dev_loss is not None},
        "selected_step": {name: c.step for name, c in chosen.items()},
        "curve": result.curve,
    }


def _predictions_file(setting: _Setting, result: Fit) -> bytes | None:
    """One row per selection, set and example: gold and predicted label, and the log-probability of every label."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if not setting.tests:
        return None
    tables = []
    for selection, checkpoint in result.checkpoints.items():
        for test in setting.tests:
            predictions: Predictions = checkpoint.predictions[test.name]
            n, free = len(test.examples), predictions.free
            tables.append(
                pa.table(
                    {
                        "selection": pa.array([selection] * n).dictionary_encode(),
                        "set": pa.array([test.name] * n).dictionary_encode(),
                        "id": [example.id for example in test.examples],
                        "label": pa.array(predictions.labels, pa.int16()),
                        "prediction": pa.array(predictions.predicted, pa.int16()),
                        "free_prediction": pa.nulls(n, pa.int16()) if free is None else pa.array(free, pa.int16()),
                        "label_log_probabilities": pa.array(list(predictions.log_probabilities), pa.list_(pa.float32())),
                    }
                )
            )
    buffer = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables).unify_dictionaries(), buffer, compression="zstd")
    return buffer.getvalue()
