"""How the time of a trial grows: with the prefix, the number of queries and the shots; and what memory a long prefix takes.

    python benchmarks/growth.py --data-dir FOLDER_WITH_RTE [--repeats 3]

CPU seconds of this process, the median of the repeats. Time per unit tells whether growth is linear: it must not rise, but for the
prefix, over which attention takes a small part that grows with its length. Memory: resident set of a trial with a prefix of 1,900
tokens, over that of the model and the keys and values of one prefix; it must stay below 1.3.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rte import N_LAYERS, N_POSITIONS, WIDTH, data_parser, save_opt, spec_of

PREFIX = 1900


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # or glibc keeps what is free
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    with tempfile.TemporaryDirectory() as scratch:
        save_opt(folder := Path(scratch) / "opt", arguments.data_dir)
        measure(folder, arguments.data_dir, arguments.repeats)


def measure(folder: Path, data_dir: str, repeats: int) -> None:
    from llmft.config.spec import TrainSpec
    from llmft.evaluation.evaluator import Evaluator
    from llmft.methods._registry import build_method
    from llmft.models.adapted import AdaptedModel
    from llmft.models.loading import borrow_model
    from llmft.prompting.encoding import EncodedQueries, EncodedTrial
    from llmft.runtime import Runtime, choose_device
    from llmft.trial.preparation import encode_prompts, prepare_trial
    from llmft.trial.run import run_trial

    spec = spec_of(folder, data_dir, method="in_context", n_shots=24)
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    ids, suffixes = encoded.prefix, [ids for ids in encoded.sets["rte"].suffixes if len(ids) < N_POSITIONS - PREFIX]
    runtime = Runtime(device="cpu")
    table = Table("what", "how much", "CPU s", "CPU ms per unit", title=f"growth (load {os.getloadavg()[0]:.1f})")

    def row(what: str, n: int, work) -> None:
        times = []
        for _ in range(repeats):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
        seconds = statistics.median(times)
        table.add_row(what, f"{n:,}", f"{seconds:.2f}", f"{1000 * seconds / n:.2f}")

    with borrow_model(spec.model, "fp32", choose_device("cpu"), copied=False) as model:
        adapted = AdaptedModel(build_method("in_context", {}), model)

        def evaluate(prefix: int, n: int) -> Evaluator:
            some = EncodedQueries(tuple(suffixes[i % len(suffixes)] for i in range(n)), (0,) * n)
            evaluator = Evaluator(adapted, EncodedTrial((ids * 4)[:prefix], {"rte": some}, (), 0), setting.words, runtime)
            evaluator.predict("rte")
            return evaluator

        evaluate(100, 64)
        for length in (250, 500, 1000, PREFIX):
            row("tokens of the prefix, 64 queries", length, lambda length=length: evaluate(length, 64))
        for n in (64, 128, 256):
            row("queries, prefix of 1,000 tokens", n, lambda n=n: evaluate(1000, n))
        base = sum(p.numel() * p.element_size() for p in model.network.parameters())
        before = resident()
        peak = Peak()
        with peak:
            evaluator = evaluate(PREFIX, 277)
        cache = sum(tensor.nbytes for layer in evaluator._prefix.layers for tensor in layer)
        assert evaluator._prefix.is_shared and cache == 2 * N_LAYERS * PREFIX * WIDTH * 4
    for n_shots in (16, 32, 64, 128):
        train = TrainSpec(epochs=1, batch_size=16)
        trial = spec_of(folder, data_dir, method="pattern", n_shots=n_shots, train=train, n_test=2)
        row("shots, pattern, one epoch", n_shots, lambda trial=trial: run_trial(trial, runtime))
    Console(width=100).print(table)
    held = base + cache
    print(
        f"memory with a prefix of {PREFIX} tokens: model {base / 2**20:.0f} MiB, one cache {cache / 2**20:.0f} MiB, all at the peak "
        f"{(base + peak.n_bytes - before) / 2**20:.0f} MiB: {(base + peak.n_bytes - before) / held:.2f} of model and cache"
    )


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


class Peak:
    """The largest resident set while the block runs; Linux keeps it, from the last reset on."""

    n_bytes = 0

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        self.n_bytes = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
