from __future__ import annotations

import pytest
import torch
from support.small_models import CPU

from llmft.config.spec import TrainSpec
from llmft.errors import UserError
from llmft.training.optimizers import build_optimizer, state_bytes
from llmft.trial.run import check_spec, run_trial


def stepped(train: TrainSpec, parameter: torch.nn.Parameter, gradients) -> torch.optim.Optimizer:
    optimizer = build_optimizer(train, [parameter], {})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer


def test_sgd_is_momentum_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    gradients = [torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])]
    stepped(TrainSpec(optimizer="sgd", learning_rate=0.1, beta1=0.8), parameter, gradients)
    moved = 0.1 * gradients[0] + 0.1 * (0.8 * gradients[0] + gradients[1])
    torch.testing.assert_close(parameter.data, torch.tensor([1.0, 2.0]) - moved)


def test_adafactors_first_step_by_hand():
    """Shazeer & Stern 2018, algorithm 4 with a given rate: V from row and column means, the update clipped at a mean square of 1."""
    start, gradient = torch.tensor([[3.0, 0.1], [-2.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, -5.0]])
    parameter = torch.nn.Parameter(start.clone())
    stepped(TrainSpec(optimizer="adafactor", learning_rate=0.01), parameter, [gradient])
    square = gradient**2  # in the first step the average is the square itself
    estimate = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    update = gradient / estimate.sqrt()
    update /= max(1.0, update.square().mean().sqrt().item())
    scale = max(1e-3, start.square().mean().sqrt().item())  # the rate is relative to the size of the parameter
    torch.testing.assert_close(parameter.data, start - 0.01 * scale * update, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("shape", [(40, 30), (70,)])
def test_the_states_take_what_is_said(name, shape):
    train = TrainSpec(optimizer=name)
    parameter = torch.nn.Parameter(torch.ones(shape))
    optimizer = stepped(train, parameter, [torch.ones(shape)])
    held = sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor) and value.ndim)
    assert held == state_bytes(train, parameter)


def test_every_optimiser_trains(spec_of):
    curves = set()
    for name, rate in (("adamw", 1e-3), ("adafactor", 1e-2), ("sgd", 1e-2)):
        record = run_trial(spec_of("pattern", optimizer=name, learning_rate=rate, epochs=4, n_test=2), CPU).record
        assert record.finished, record.message
        losses = tuple(point.train_loss for point in record.curve)
        assert losses[-1] < losses[0] - 0.5
        curves.add(losses)
    assert len(curves) == 3


def test_eight_bits_need_a_gpu(spec_of):
    with pytest.raises(UserError, match="adamw_8bit needs"):
        check_spec(spec_of("pattern", optimizer="adamw_8bit"))
    check_spec(spec_of("pattern", optimizer="adamw_8bit"), here=False)
    check_spec(spec_of("zero_shot", optimizer="adamw_8bit"))  # trains nothing
