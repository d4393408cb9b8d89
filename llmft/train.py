"""The one training loop of every method that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product

import torch

from llmft.batches import deal, make_batch
from llmft.distributed import shard_of
from llmft.errors import Cause, TrialFailure
from llmft.evaluate import Evaluator, Generated, Predictions
from llmft.optimizers import build_optimizer
from llmft.record import CurvePoint, VirtualToken
from llmft.seeds import derive, stream
from llmft.setting import DEV, SHOTS
from llmft.spec import ORACLES, Selection, TrialSpec
from llmft.start import Start


@dataclass
class Checkpoint:
    """A selected state: its step, dev score, and what it predicts on the test sets (filled at once for oracles, else at the end)."""

    step: int
    dev_score: float | None
    dev_loss: float | None
    weights: dict[str, torch.Tensor] | None = None
    predictions: Mapping[str, Predictions | Generated] = field(default_factory=dict)


@dataclass
class Fit:
    """What a trial leaves: the selected checkpoints, the curve, the cost, and what else is worth knowing about the adapted model.

    Attributes:
        first_loss, last_loss: of the first step and, on average, of the last epoch.
        weight_distance: how far the base's weights have moved (`Start.distance`).
        virtual_tokens: what the tokens of a learned prompt resemble.
        content_free: the label words' mean probabilities for queries without content, by which scores are calibrated.
    """

    checkpoints: dict[Selection, Checkpoint] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    first_loss: float = math.nan
    last_loss: float = math.nan
    n_tokens: int = 0
    n_steps: int = 0
    n_skipped_steps: int = 0
    weight_distance: dict[Selection, float] = field(default_factory=dict)
    virtual_tokens: list[VirtualToken] = field(default_factory=list)
    content_free: list[float] | None = None


def n_warmup_steps(warmup_ratio: float, n_steps: int) -> int:
    """Steps of warm-up: the share of all steps, rounded up, so that a small training never has none by accident."""
    return math.ceil(round(warmup_ratio * n_steps, 9))


def learning_rate_factor(step: int, n_steps: int, n_warmup: int, schedule: str) -> float:
    """What the learning rate is multiplied by in step `step` (from 0): linear warm-up, then the schedule."""
    if step < n_warmup:
        return (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[schedule]


def fit(
    spec: TrialSpec,
    module: torch.nn.Module,
    evaluator: Evaluator,
    tests: Mapping[str, str],
    result: Fit,
    reteach: Callable[[], None] | None = None,
) -> None:
    """Train in place on the shots (and on what else is among `EncodedTrial.trained`), and pick the checkpoints that `spec.selections` names.

    Every process computes its share of each batch; weights, loss and looks at the dev set are the same in all of them. Dropout
    has a stream of its own in each.

    A method of several rounds (`Method.n_rounds`) goes on from the weights that it has, with an optimiser and a schedule of its own
    for the epochs of each round. Steps, epochs and selections are those of the whole training.

    Args:
        module: what the runtime's `wrap` made of `evaluator.adapted`.
        evaluator: scores dev and the test sets; also holds the encoded shots and the runtime.
        tests: test set -> "in" or "out"; read during training only by the oracle selections.
        result: filled step by step, so that a training that fails leaves what it knew.
        reteach: called before every round but the first.

    Raises:
        TrialFailure: the loss or a score is no longer finite (DIVERGED), the time is over (TIMEOUT), or the dev score is below
            the runtime's floor (PRUNED).
    """
    train, encoded = spec.train, evaluator.encoded
    training = [(name, place) for name in encoded.trained for place in range(len(encoded.sets[name]))]
    lengths = [length for name in encoded.trained for length in encoded.lengths(name)]
    model, runtime = evaluator.adapted.model, evaluator.runtime
    trainable = {name: parameter for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    steps_per_epoch = math.ceil(len(training) / train.batch_size)
    n_steps = steps_per_epoch * train.epochs
    n_warmup = n_warmup_steps(train.warmup_ratio, n_steps)
    if train.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    method = evaluator.adapted.method
    batch_order = stream(spec.order_seed, "batches")
    origin = Start(model.network, model.base_names, runtime)
    keeper = _Keeper(spec, evaluator, trainable, origin, tests, result)
    model.network.eval()
    with torch.no_grad():
        method.begin(evaluator.adapted, evaluator.every(SHOTS))
    if method.n_fisher_samples:
        result.n_tokens += origin.weigh(evaluator, method.n_fisher_samples, derive(spec.dropout_seed, "fisher"))
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(derive(spec.dropout_seed, f"dropout/{runtime.rank}" if runtime.rank else "dropout"))
        for n_before, epoch in product(range(0, method.n_rounds * train.epochs, train.epochs), range(1, train.epochs + 1)):
            if epoch == 1:
                if n_before:
                    reteach()
                optimizer = build_optimizer(train, trainable.values())
                schedule = torch.optim.lr_scheduler.LambdaLR(
                    optimizer, lambda step: learning_rate_factor(step, n_steps, n_warmup, train.schedule)
                )
                scaler = torch.amp.GradScaler(model.device.type, enabled=spec.precision == "fp16")
            model.network.train()
            order, losses = batch_order.permutation(len(training)), []
            for start in range(0, len(training), train.batch_size):
                runtime.check_time()
                rows = order[start : start + train.batch_size].tolist()
                loss = _add_gradients(module, evaluator, [training[i] for i in rows], [lengths[i] for i in rows], scaler)
                result.n_tokens += sum(lengths[i] for i in rows)
                if not math.isfinite(loss):
                    raise TrialFailure(
                        Cause.DIVERGED,
                        f"the loss was {loss} in step {result.n_steps + 1} of {n_steps * method.n_rounds}; lower the learning rate.",
                    )
                scaler.unscale_(optimizer)
                if method.pull_to_start:
                    origin.pull(method.pull_to_start)
                if train.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trainable.values(), train.clip_norm)
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                result.n_skipped_steps += scaler.is_enabled() and scaler.get_scale() < scale  # fp16 overflow: no step was taken
                optimizer.zero_grad(set_to_none=True)
                rate = schedule.get_last_lr()[0]
                schedule.step()
                result.n_steps += 1
                losses.append(loss)
            result.last_loss = sum(losses) / len(losses)
            if n_before + epoch == 1:
                result.first_loss = losses[0]
            stopped = bool(runtime.largest(runtime.should_stop()))
            if epoch % train.eval_every_epochs == 0 or epoch == train.epochs or stopped:
                is_last = stopped or n_before + epoch == method.n_rounds * train.epochs
                keeper.look(n_before + epoch, result.last_loss, rate, last=is_last)
                point = result.curve[-1]
                runtime.report(
                    {
                        "epoch": point.epoch,
                        "train_loss": point.train_loss,
                        "dev_score": point.dev_score,
                        "dev_loss": point.dev_loss,
                    }
                )
                _prune(result.curve, runtime.stop_below)
            if stopped:
                break
    keeper.finish()


def _add_gradients(
    module: torch.nn.Module,
    evaluator: Evaluator,
    rows: Sequence[tuple[str, int]],
    lengths: Sequence[int],
    scaler: torch.amp.GradScaler,
) -> float:
    """Run one batch forward and backward, and give its mean loss, both over all processes.

    A forward pass holds examples of one set, since sets differ in their label words; every example of the batch counts alike.

    Args:
        rows: which examples: the set of each, and its place there.
        lengths: the tokens of each.
    """
    encoded, runtime, loss = evaluator.encoded, evaluator.runtime, 0.0
    passes: list[tuple[str, list[int], bool]] = []
    for name in dict.fromkeys(name for name, _ in rows):
        places, sizes = zip(*((place, n) for (of, place), n in zip(rows, lengths, strict=True) if of == name), strict=True)
        groups = deal(sizes, runtime.micro_batch_tokens, runtime.rank, runtime.world_size)
        passes += [(name, [places[i] for i in group], counts) for group, counts in groups]
    for number, (name, group, counts) in enumerate(passes, 1):
        queries = encoded.sets[name]
        batch = make_batch(queries, group, queries.words, evaluator.adapted.model, opening=encoded.opening(name))
        share = len(group) / len(rows) * runtime.world_size if counts else 0.0  # gradients are averaged over the processes
        with nullcontext() if number == len(passes) else module.no_sync():
            part = module("loss", batch) * share
            scaler.scale(part).backward()
        loss += part.item()
    return runtime.mean(loss)


def _prune(curve: list[CurvePoint], stop_below: Mapping[int, float]) -> None:
    """Give up what did worse by this epoch than is asked of it."""
    best = max((point.dev_score for point in curve if point.dev_score is not None), default=math.inf)
    epoch = curve[-1].epoch
    if best < stop_below.get(epoch, -math.inf):
        raise TrialFailure(
            Cause.PRUNED,
            f"the best dev score by epoch {epoch} was {best:.3f}; the search goes on from {stop_below[epoch]:.3f}.",
        )


class _Keeper:
    """Looks at the dev set (and, for oracles, at the test sets) during training and keeps the best states."""

    def __init__(
        self,
        spec: TrialSpec,
        evaluator: Evaluator,
        trainable: Mapping[str, torch.nn.Parameter],
        start: Start,
        tests: Mapping[str, str],
        result: Fit,
    ):
        self.spec, self.evaluator, self.trainable, self.result = spec, evaluator, trainable, result
        self.start, self.names = start, list(tests)
        self.in_domain = next((name for name, domain in tests.items() if domain == "in"), None)
        self.out_of_domain = next((name for name, domain in tests.items() if domain == "out"), None)
        self.best: dict[Selection, tuple] = {}

    def look(self, epoch: int, train_loss: float, rate: float, last: bool) -> None:
        """Score dev, note a point of the curve, and keep this state for every selection that it wins."""
        evaluator, result = self.evaluator, self.result
        dev = evaluator.predict(DEV) if DEV in evaluator.encoded.sets else None
        score, loss = (dev.score, dev.loss) if dev else (None, None)
        result.curve.append(
            CurvePoint(
                step=result.n_steps,
                epoch=epoch,
                train_loss=train_loss,
                learning_rate=rate,
                dev_score=score,
                dev_loss=loss,
            )
        )
        here = result.checkpoints["last"] = Checkpoint(result.n_steps, score, loss)
        if "best_dev" in self.spec.selections and self._wins("best_dev", dev.rank):
            weights = None if last else {name: shard_of(p).to("cpu", copy=True) for name, p in self.trainable.items()}
            result.checkpoints["best_dev"] = here if last else Checkpoint(here.step, score, loss, weights)
        wanted = [oracle for oracle in ORACLES if oracle in self.spec.selections]
        if wanted:
            here.predictions = evaluator.predict_all(self.names)
            for oracle in wanted:
                name = self.in_domain if oracle == "best_in_domain" else self.out_of_domain
                if name and self._wins(oracle, here.predictions[name].rank):
                    result.checkpoints[oracle] = here
                    self._measure(oracle)

    def _measure(self, selection: Selection) -> None:
        self.result.weight_distance[selection] = self.start.distance()

    def _wins(self, selection: Selection, score: tuple) -> bool:
        if selection in self.best and score <= self.best[selection]:
            return False
        self.best[selection] = score
        return True

    def finish(self) -> None:
        """Predict the test sets for the checkpoints that have not: the last state as it stands, then the best on dev.

        What stays in the model is the best on dev where that is selected, else the last.
        """
        checkpoints, last = self.result.checkpoints, self.result.checkpoints["last"]
        if "last" not in self.spec.selections:
            del checkpoints["last"]
        else:
            self._measure("last")
            if not last.predictions:
                last.predictions = self.evaluator.predict_all(self.names)
        best = checkpoints.get("best_dev")
        if best is None:
            return
        if best.weights is not None:
            for name, parameter in self.trainable.items():
                shard_of(parameter).copy_(best.weights[name])
            self.evaluator.adapted.reshard()
        best.weights = None
        self._measure("best_dev")
        if not best.predictions:
            best.predictions = self.evaluator.predict_all(self.names)
