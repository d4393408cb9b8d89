"""The one training loop of every method that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from llmft.config import TrialSpec
from llmft.errors import Cause, TrialFailure
from llmft.evaluation import Evaluator
from llmft.methods import Recipe
from llmft.models import LoadedModel, make_batch, shard_batches, split_for_training
from llmft.records import CurvePoint
from llmft.seeds import derive, stream
from llmft.training.checkpoints import CheckpointTracker, TrainingResult
from llmft.training.optimizers import build_optimizer, layer_lr_factors
from llmft.training.weight_anchor import WeightAnchor


def n_warmup_steps(warmup_ratio: float, n_steps: int) -> int:
    """Compute the steps of warm-up: the share of all steps, rounded up, so that a small training never has none by accident."""
    return math.ceil(round(warmup_ratio * n_steps, 9))


def learning_rate_factor(step: int, n_steps: int, n_warmup: int, schedule: str) -> float:
    """Compute what the learning rate is multiplied by in step `step` (from 0): linear warm-up, then the schedule."""
    if step < n_warmup:
        return (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[schedule]


def train(
    spec: TrialSpec,
    recipe: Recipe,
    module: Any,
    evaluator: Evaluator,
    tests: Mapping[str, str],
    result: TrainingResult,
    refresh_targets: Callable[[], None] = lambda: None,
) -> None:
    """Train in place on the shots (and on what else is among `EncodedTrial.trained`), and keep the checkpoints of `spec.selections`.

    The last is the state after all epochs, or where `train.patience` or the runtime ends them, but the learning rates are laid out over
    all. Every process computes its share of each batch; weights, loss and dev scores are the same in all of them. Dropout has a
    stream of its own in each.

    A distillation of several rounds goes on from the weights that it has, with an optimizer, a schedule and a patience of its own for
    the epochs of each round. Steps, epochs and selections are those of the whole training.

    Args:
        module: what the runtime's `wrap` made of `evaluator.adapted`.
        evaluator: scores dev and the test sets; also holds the encoded shots and the runtime.
        tests: test set -> "in" or "out"; read during training only by the oracle selections.
        result: filled step by step, so that a training that fails leaves what it knew.
        refresh_targets: called before every round but the first.

    Raises:
        TrialFailure: the loss or a score is no longer finite (DIVERGED), the time is over (TIMEOUT), or the dev score is below
            the runtime's threshold (PRUNED).
    """
    model, runtime = evaluator.adapted.model, evaluator.runtime
    if spec.train.gradient_checkpointing:
        model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = Trainer(spec, recipe, module, evaluator, tests, result)
    if recipe.anchor and recipe.anchor.n_fisher_samples:
        seed = derive(spec.dropout_seed, "fisher")
        result.n_tokens += trainer.anchor.estimate_fisher(evaluator, recipe.anchor.n_fisher_samples, seed)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(derive(spec.dropout_seed, f"dropout/{runtime.rank}" if runtime.rank else "dropout"))
        for number in range(trainer.n_rounds):
            if number:
                refresh_targets()
            if trainer.round(number):
                break
    trainer.tracker.finish()


class Trainer:
    """The state of one training: the order of the examples, the optimizer's steps, and the checkpoints; arguments as of `train`."""

    def __init__(
        self,
        spec: TrialSpec,
        recipe: Recipe,
        module: Any,
        evaluator: Evaluator,
        tests: Mapping[str, str],
        result: TrainingResult,
    ):
        self.train, self.module, self.evaluator, self.result = spec.train, module, evaluator, result
        self.spec, self.model, self.runtime = spec, evaluator.adapted.model, evaluator.runtime
        encoded, network = evaluator.encoded, self.model.network
        self.rows = [(name, position) for name in encoded.trained for position in range(len(encoded.sets[name]))]
        self.lengths = [length for name in encoded.trained for length in encoded.lengths(name)]
        self.n_rounds = recipe.teacher.n_rounds if recipe.teacher else 1
        self.n_steps = math.ceil(len(self.rows) / spec.train.batch_size) * spec.train.epochs  # of a round
        self.anchor = WeightAnchor(network, self.model.base_names, self.runtime)
        self.anchor_strength = recipe.anchor.strength if recipe.anchor else 0.0
        self.trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.tracker = CheckpointTracker(spec, evaluator, self.trainable, self.anchor, tests, result)
        self._order = stream(spec.order_seed, "batches")

    def round(self, number: int) -> bool:
        """Train the round `number`, from 0; returns whether the runtime ended the training."""
        stepper, train = _Stepper(self.spec, self.model, self.trainable.values(), self.n_steps), self.train
        self.tracker.n_since_best = 0
        for epoch in range(1, train.epochs + 1):
            self.result.last_loss = self.epoch(stepper)
            stopped = bool(self.runtime.largest(self.runtime.should_stop()))
            if epoch % train.eval_every_epochs == 0 or epoch == train.epochs or stopped:
                is_last = stopped or (epoch == train.epochs and number == self.n_rounds - 1)
                self.evaluate(number * train.epochs + epoch, stepper.rate, is_last)
            if stopped or self.tracker.is_out_of_patience:
                return stopped
        return False

    def epoch(self, stepper: _Stepper) -> float:
        """Train on every example once, in a new order; returns the mean of the steps' losses."""
        self.model.network.train()
        order, size = self._order.permutation(len(self.rows)).tolist(), self.train.batch_size
        losses = [self.step(order[start : start + size], stepper) for start in range(0, len(order), size)]
        if math.isnan(self.result.first_loss):
            self.result.first_loss = losses[0]
        return sum(losses) / len(losses)

    def step(self, indices: Sequence[int], stepper: _Stepper) -> float:
        """Take one optimizer step on the examples at `indices`; returns their mean loss."""
        self.runtime.check_time()
        result, lengths = self.result, [self.lengths[i] for i in indices]
        loss = _add_gradients(self.module, self.evaluator, [self.rows[i] for i in indices], lengths, stepper.scaler)
        result.n_tokens += sum(lengths)
        if not math.isfinite(loss):
            raise TrialFailure(
                Cause.DIVERGED,
                f"the loss was {loss} in step {result.n_steps + 1} of {self.n_steps * self.n_rounds}; lower the learning rate.",
            )
        result.n_skipped_steps += stepper.step(self.anchor, self.anchor_strength)
        result.n_steps += 1
        return loss

    def evaluate(self, epoch: int, rate: float, is_last: bool) -> None:
        """Score dev, keep what was selected, report, and end the training where it is worse than the runtime's threshold."""
        self.tracker.evaluate_and_track(epoch, self.result.last_loss, rate, last=is_last)
        point = self.result.curve[-1]
        report = {"epoch": point.epoch, "train_loss": point.train_loss, "dev_score": point.dev_score, "dev_loss": point.dev_loss}
        self.runtime.report(report)
        _prune(self.result.curve, self.runtime.stop_below)


class _Stepper:
    """The optimizer and its schedule in one round.

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

    def step(self, anchor: WeightAnchor, anchor_strength: float) -> bool:
        """Take one step with the gradients that there are; returns whether fp16 overflowed, so that none was taken."""
        self.scaler.unscale_(self._optimizer)
        if anchor_strength:
            anchor.add_penalty_gradient(anchor_strength)
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
    module: Any, evaluator: Evaluator, rows: Sequence[tuple[str, int]], lengths: Sequence[int], scaler: torch.amp.GradScaler
) -> float:
    """Run one batch forward and backward, and give its mean loss, both over all processes.

    A forward pass holds examples of one set, since sets differ in their label words; every example of the batch counts alike.

    Args:
        rows: which examples: the set of each, and its position there.
        lengths: the tokens of each.
    """
    encoded, runtime, loss = evaluator.encoded, evaluator.runtime, 0.0
    passes: list[tuple[str, list[int], bool]] = []
    for name in dict.fromkeys(name for name, _ in rows):
        positions, sizes = zip(*((position, n) for (of, position), n in zip(rows, lengths, strict=True) if of == name), strict=True)
        if runtime.world_size == 1:
            groups = [(group, True) for group in split_for_training(sizes, runtime.micro_batch_tokens, evaluator.adapted.model.device)]
        else:  # all must take part in every pass, and what they exchange costs more than padding
            groups = shard_batches(sizes, runtime.micro_batch_tokens, runtime.rank, runtime.world_size)
        passes += [(name, [positions[i] for i in group], counts) for group, counts in groups]
    for number, (name, group, counts) in enumerate(passes, 1):
        queries = encoded.sets[name]
        batch = make_batch(queries, group, queries.label_words, evaluator.adapted.model, prefix_ids=encoded.prefix_of(name))
        share = len(group) / len(rows) * runtime.world_size if counts else 0.0  # gradients are averaged over the processes
        with nullcontext() if number == len(passes) else module.no_sync():
            part = module(evaluator.adapted.method.loss, batch) * share
            scaler.scale(part).backward()
        loss += part.item()
    return runtime.mean(loss)


def _prune(curve: list[CurvePoint], stop_below: Mapping[int, float]) -> None:
    """Raise PRUNED where the best dev score by this epoch is below its threshold."""
    best = max((point.dev_score for point in curve if point.dev_score is not None), default=math.inf)
    epoch = curve[-1].epoch
    if best < stop_below.get(epoch, -math.inf):
        raise TrialFailure(
            Cause.PRUNED, f"the best dev score by epoch {epoch} was {best:.3f}; the search goes on from {stop_below[epoch]:.3f}."
        )
