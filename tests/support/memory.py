"""Measured peaks of memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmft.methods._registry import method_class
from llmft.models.loading import _load_base
from llmft.runtime import Runtime
from llmft.trial.run import run_trial
from support.small_models import FLAN, save_model, t5_tokenizer, toy_text
from sweeps.resources.memory import estimate_memory
from sweeps.resources.network_sizes import count_networks
from sweeps.resources.workload import largest_workload


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny kernels on many threads wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


class Meter(TorchDispatchMode):
    """Adds up the bytes of every storage that is made inside and still alive; `peak` is the most since it was set last."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        if (key := storage._cdata) not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key, size):
        del self._alive[key]
        self.now -= size


def estimate_of(cells, **options):
    work = largest_workload(cells)
    return estimate_memory(work, count_networks(work), **options)


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
