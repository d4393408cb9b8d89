"""The one training loop of every method that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from llmft.config import TrialSpec
from llmft.errors import Cause, TrialFailure
from llmft.evaluation import Evaluator
from llmft.models import LoadedModel, make_batch, shard_batches, split_for_training
from llmft.prompting import SHOTS
from llmft.records import CurvePoint
from llmft.seeds import derive, stream
from llmft.training.checkpoints import CheckpointTracker, TrainingResult
from llmft.training.optimizers import build_optimizer, layer_lr_factors
from llmft.training.weight_anchor import WeightAnchor


def n_warmup_steps(warmup_ratio: float, n_steps: int) -> int:
    """Steps of warm-up: the share of all steps, rounded up, so that a small training never has none by accident."""
    return math.ceil(round(warmup_ratio * n_steps, 9))


def learning_rate_factor(step: int, n_steps: int, n_warmup: int, schedule: str) -> float:
    """What the learning rate is multiplied by in step `step` (from 0): linear warm-up, then the schedule."""
    if step < n_warmup:
        return (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[schedule]


def train(
    spec: TrialSpec,
    module: torch.nn.Module,
    evaluator: Evaluator,
    tests: Mapping[str, str],
    result: TrainingResult,
    reteach: Callable[[], None] | None = None,
) -> None:
    """Train in place on the shots (and on what else is among `EncodedTrial.trained`), and pick the checkpoints that `spec.selections` names.

    The last is the state after all epochs, or where `train.patience` or the runtime ends them, but the learning rates are laid out over
    all.
    Every process computes its share of each batch; weights, loss and looks at the dev set are the same in all of them. Dropout
    has a stream of its own in each.

    A method of several rounds (`Method.n_rounds`) goes on from the weights that it has, with an optimiser, a schedule and a patience of
    its own for the epochs of each round. Steps, epochs and selections are those of the whole training.

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
    train, encoded, method = spec.train, evaluator.encoded, evaluator.adapted.method
    training = [(name, place) for name in encoded.trained for place in range(len(encoded.sets[name]))]
    lengths = [length for name in encoded.trained for length in encoded.lengths(name)]
    model, runtime = evaluator.adapted.model, evaluator.runtime
    trainable = {name: parameter for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    n_steps = math.ceil(len(training) / train.batch_size) * train.epochs
    if train.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch_order = stream(spec.order_seed, "batches")
    origin = WeightAnchor(model.network, model.base_names, runtime)
    keeper = CheckpointTracker(spec, evaluator, trainable, origin, tests, result)
    model.network.eval()
    with torch.no_grad():
        method.begin(evaluator.adapted, evaluator.every(SHOTS))
    if method.n_fisher_samples:
        result.n_tokens += origin.weigh(evaluator, method.n_fisher_samples, derive(spec.dropout_seed, "fisher"))

    def epoch_loss(stepper: _Stepper) -> float:
        """Train an epoch; gives the mean of its losses."""
        model.network.train()
        order, losses = batch_order.permutation(len(training)), []
        for start in range(0, len(training), train.batch_size):
            runtime.check_time()
            rows = order[start : start + train.batch_size].tolist()
            loss = _add_gradients(module, evaluator, [training[i] for i in rows], [lengths[i] for i in rows], stepper.scaler)
            result.n_tokens += sum(lengths[i] for i in rows)
            if not math.isfinite(loss):
                raise TrialFailure(
                    Cause.DIVERGED,
                    f"the loss was {loss} in step {result.n_steps + 1} of {n_steps * method.n_rounds}; lower the learning rate.",
                )
            result.n_skipped_steps += stepper.step(origin, method.pull_to_start)
            result.n_steps += 1
            losses.append(loss)
        if math.isnan(result.first_loss):
            result.first_loss = losses[0]
        return sum(losses) / len(losses)

    def fit_round(number: int) -> bool:
        """Train the round, from 0; says whether the runtime ended the training."""
        stepper, stopped = _Stepper(spec, model, trainable.values(), n_steps), False
        keeper.n_since_best = 0
        for epoch in range(1, train.epochs + 1):
            result.last_loss = epoch_loss(stepper)
            stopped = bool(runtime.largest(runtime.should_stop()))
            if epoch % train.eval_every_epochs == 0 or epoch == train.epochs or stopped:
                is_last = stopped or (epoch == train.epochs and number == method.n_rounds - 1)
                keeper.look(number * train.epochs + epoch, result.last_loss, stepper.rate, last=is_last)
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
            if stopped or keeper.is_out_of_patience:
                break
        return stopped

    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(derive(spec.dropout_seed, f"dropout/{runtime.rank}" if runtime.rank else "dropout"))
        for number in range(method.n_rounds):
            if number:
                reteach()
            if fit_round(number):
                break
    keeper.finish()


class _Stepper:
    """Takes the optimiser's steps of one round.

    Attributes:
        rate: the learning rate of the last step, before `train.layer_decay`.
    """

    def __init__(self, spec: TrialSpec, model: LoadedModel, parameters: Iterable[torch.nn.Parameter], n_steps: int):
        train = spec.train
        n_warmup = n_warmup_steps(train.warmup_ratio, n_steps)
        self._train, self._parameters, self._n_taken = train, list(parameters), 0
        self._factor = partial(learning_rate_factor, n_steps=n_steps, n_warmup=n_warmup, schedule=train.schedule)
        self._optimizer = build_optimizer(train, self._parameters, layer_lr_factors(model, train.layer_decay))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._factor)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=spec.precision == "fp16")
        self.rate = math.nan

    def step(self, origin: WeightAnchor, pull_to_start: float) -> bool:
        """Take one with the gradients that there are; says whether fp16 overflowed, so that none was taken."""
        self.scaler.unscale_(self._optimizer)
        if pull_to_start:
            origin.pull(pull_to_start)
        if self._train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._train.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.rate = self._train.learning_rate * self._factor(self._n_taken)
        self._schedule.step()
        self._n_taken += 1
        return self.scaler.is_enabled() and self.scaler.get_scale() < scale


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
        if runtime.world_size == 1:
            groups = [(group, True) for group in split_for_training(sizes, runtime.micro_batch_tokens, evaluator.adapted.model.device)]
        else:  # all must take part in every pass, and what they exchange costs more than padding
            groups = shard_batches(sizes, runtime.micro_batch_tokens, runtime.rank, runtime.world_size)
        passes += [(name, [places[i] for i in group], counts) for group, counts in groups]
    for number, (name, group, counts) in enumerate(passes, 1):
        queries = encoded.sets[name]
        batch = make_batch(queries, group, queries.words, evaluator.adapted.model, opening=encoded.opening(name))
        share = len(group) / len(rows) * runtime.world_size if counts else 0.0  # gradients are averaged over the processes
        with nullcontext() if number == len(passes) else module.no_sync():
            part = module(evaluator.adapted.method.loss, batch) * share
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
