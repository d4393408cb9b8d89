"""One trial: a spec in, a record out."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from llmft import cost, findings, registry
from llmft.errors import Cause, TrialFailure, UserError, unknown_name
from llmft.evaluate import Evaluator, Predictions
from llmft.method import Method
from llmft.metrics import set_metrics
from llmft.model import borrow_model, choose_device, context_length, load_config, load_tokenizer
from llmft.record import Cost, Draws, TrialRecord
from llmft.runtime import Runtime
from llmft.seeds import derive, stream
from llmft.spec import DataRef, TrialSpec
from llmft.task import Draw, Task, TaskData, TestSet, draw_examples, subsample
from llmft.tokens import EncodedTrial, LabelWords, encode_trial, resolve_label_words
from llmft.train import DEV, SHOTS, Checkpoint, Fit, fit


@dataclass(frozen=True)
class TrialResult:
    """A record and, for a finished trial, its per-example predictions as a parquet file's bytes."""

    record: TrialRecord
    predictions: bytes | None = None


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

    Never raises for a trial that fails: the record then says so, with a typed cause.
    """
    began = time.perf_counter()
    try:
        return _run(spec, runtime, began)
    except UserError as error:
        cause, message = Cause.USER_ERROR, str(error)
    except TrialFailure as failure:
        cause, message = failure.cause, failure.message
    except torch.OutOfMemoryError as error:
        cause, message = Cause.OUT_OF_MEMORY, str(error).splitlines()[0]
    except Exception as error:  # a failure is a row, also one that nobody foresaw
        cause, message = Cause.CRASHED, f"{type(error).__name__}: {error}"
        if "not enough memory" in message or "out of memory" in message:
            cause = Cause.OUT_OF_MEMORY
    spent = Cost(wall_s=time.perf_counter() - began)
    provenance = {"packages": cost.packages()}
    record = TrialRecord(
        digest=spec.digest, spec=spec, status="failed", cause=cause, message=message[:2000], cost=spent, provenance=provenance
    )
    return TrialResult(record)


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
def load_data(task: str, data: DataRef) -> TaskData:
    """A task's rows, kept for the next trial."""
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
    data, pattern = load_data(spec.task, spec.data), task.patterns[spec.pattern]
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


def _run(spec: TrialSpec, runtime: Runtime, began: float) -> TrialResult:
    setting, device = _settle(spec), choose_device(runtime.device)
    _check_precision(spec, device)
    method, memory = setting.method, cost.PeakMemory(device)
    encoded = _encode(spec, setting)
    domains = {test.name: test.domain for test in setting.tests}
    dropout = spec.train.dropout if method.trains else None
    with borrow_model(spec.model, spec.precision, device, dropout, copied=method.trains) as model:
        n_parameters = sum(parameter.numel() for parameter in model.network.parameters())
        if method.trains:
            method.prepare(model, len(setting.task.labels), torch.Generator().manual_seed(derive(spec.init_seed, "init")))
        trainable = {p: p.numel() for p in model.network.parameters() if p.requires_grad}
        evaluator = Evaluator(method, model, encoded, setting.words, runtime)
        started = time.perf_counter()
        result = fit(spec, method, model, evaluator, runtime, domains) if method.trains else _score(evaluator, domains)
        finished = time.perf_counter()
        spent = Cost(
            wall_s=finished - began,
            train_s=finished - started if method.trains else 0.0,
            evaluate_s=0.0 if method.trains else finished - started,
            device=cost.device_name(device),
            peak_memory_bytes=memory.n_bytes,
            tokens_trained=result.n_tokens,
            tokens_evaluated=evaluator.n_tokens,
            n_parameters=n_parameters,
            n_trainable_parameters=sum(trainable.values()),
            stored_bytes=sum(n * p.element_size() for p, n in trainable.items()),
            tokens_per_query=_tokens_per_query(encoded, domains),
            flops=cost.flops(n_parameters, result.n_tokens, evaluator.n_tokens),
            n_steps=result.n_steps,
            n_workers=runtime.world_size,
        )
    return _record(spec, setting, encoded, result, spent)


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


def _score(evaluator: Evaluator, domains: Mapping[str, str]) -> Fit:
    """The result of a method that trains nothing: one 'checkpoint', the model as it is."""
    dev = evaluator.predict(DEV) if DEV in evaluator.encoded.sets else None
    here = Checkpoint(
        0, dev.accuracy if dev else None, dev.loss if dev else None, predictions=evaluator.predict_all(list(domains))
    )
    return Fit(checkpoints={"none": here})


def _tokens_per_query(encoded: EncodedTrial, names: Mapping[str, str]) -> float:
    lengths = [len(ids) for name in list(names) or [DEV] for ids in encoded.sets[name].suffixes]
    return len(encoded.prefix) + sum(lengths) / max(1, len(lengths))


def _record(spec: TrialSpec, setting: _Setting, encoded: EncodedTrial, result: Fit, spent: Cost) -> TrialResult:
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
    record = TrialRecord(
        digest=spec.digest,
        spec=spec,
        status="finished",
        dev_accuracy={s: c.dev_accuracy for s, c in result.checkpoints.items() if c.dev_accuracy is not None},
        dev_loss={s: c.dev_loss for s, c in result.checkpoints.items() if c.dev_loss is not None},
        selected_step={s: c.step for s, c in result.checkpoints.items()},
        metrics=metrics,
        curve=result.curve,
        findings=found,
        draws=draws,
        cost=spent,
        provenance={
            "packages": cost.packages(),
            "data_revision": setting.data.revision,
            "label_tokens": [list(i) for i in setting.words.ids],
        },
    )
    return TrialResult(record, _predictions_file(setting, result))


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
