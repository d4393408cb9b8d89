"""Measured peaks of memory."""

import pytest
import torch

from llmft.methods._registry import method_class
from llmft.models.loading import _load_base
from llmft.runtime import Runtime
from llmft.trial.run import run_trial
from support.small_models import FLAN, save_model, t5_tokenizer, toy_text
from sweeps.resources.tensor_meter import Meter


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny kernels on many threads wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def peak_of_trial(spec):
    """Bytes of the tensors alive at the worst moment of a real trial whose base model is loaded already."""
    base, _ = _load_base(spec.model, spec.train.dropout, method_class(spec.method).base_weights)
    with Meter() as meter:
        for tensor in [*base.parameters(), *base.buffers()]:
            tensor.detach()  # so that the meter knows it
        before = meter.now
        record = run_trial(spec, Runtime(device="cpu")).record
    assert record.finished, record.message
    return meter.peak - before, record.cost


@pytest.fixture(scope="module")
def tiny_flan(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "flan", "t5", t5_tokenizer(toy_text()), **FLAN)
