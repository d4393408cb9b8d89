"""Where the time of a trial goes: a trial of the quickstart, and trials on real RTE and HANS.

    python benchmarks/where_time_goes.py --data-dir FOLDER_WITH_RTE_AND_HANS [--n-test 2000]

CPU time of one thread as Python's profiler sees it, by what it was spent on, when model and data were loaded by a trial before. What
remains of "forward" and "backward" is matrix products: the floor for this hardware.
"""

from __future__ import annotations

import cProfile
import pstats
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rte import data_parser, save_opt, spec_of

PARTS = {  # what -> the function in whose calls it is spent
    "draw, rows and checks": ("preparation.py", "prepare_trial"),
    "tokenising": ("setting.py", "encode_prompts"),
    "copying the model": ("copy.py", "deepcopy"),
    "encoding the prefix": ("shared_prefix.py", "encode_shared"),
    "forward over queries": ("scoring.py", "label_word_scores"),
    "making batches": ("batches.py", "make_batch"),
    "backward": ("_tensor.py", "backward"),
    "clipping": ("clip_grad.py", "clip_grad_norm_"),
    "optimiser": ("adamw.py", "step"),
    "record, metrics, findings": ("result.py", "finished_record"),
    "predictions file": ("result.py", "predictions_file"),
}


def profiled(spec) -> dict[str, float]:
    """Seconds of CPU by part, and of the whole."""
    from llmft.runtime import Runtime
    from llmft.trial.run import run_trial

    run_trial(spec.model_copy(update={"n_test": 8}), Runtime(device="cpu"))
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    result = run_trial(spec, Runtime(device="cpu"))
    profile.disable()
    assert result.record.finished, result.record.message
    found, whole = dict.fromkeys(PARTS, 0.0), 0.0
    for (file, _, name), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():
        whole = max(whole, cumulative)
        for part, place in PARTS.items():
            if (Path(file).name, name) == place:
                found[part] = max(found[part], cumulative)
    return found | {"all else": whole - sum(found.values()), "whole": whole}


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--n-test", type=int, default=2000)
    arguments = parser.parse_args()
    from llmft.config.spec import DataRef, TrainSpec
    from llmft.models.info import resolve_model

    with tempfile.TemporaryDirectory() as scratch:
        save_opt(folder := Path(scratch) / "opt", arguments.data_dir)
        on_rte = {"test_sets": ("rte", "hans"), "n_test": arguments.n_test}
        toy = {"model": resolve_model("toy"), "data": DataRef(), "task": "toy", "pattern": "minimal", "test_sets": None, "n_dev": 64}
        trials = {
            "quickstart, lora": {**toy, "method": "lora", "settings": _settings("lora"),
                "n_shots": 16, "train": TrainSpec(learning_rate=1e-3, epochs=10)},
            "quickstart, in-context": {**toy, "method": "in_context", "n_shots": 16},
            "RTE and HANS, in-context": {**on_rte, "method": "in_context", "n_shots": 16},
            "RTE and HANS, pattern": {**on_rte, "method": "pattern", "n_shots": 16, "train": TrainSpec(epochs=2)},
        }  # fmt: skip
        columns = {name: profiled(spec_of(folder, arguments.data_dir, **fields)) for name, fields in trials.items()}
    table = Table("CPU s", *columns, title="where the time of a trial goes")
    for part in (*PARTS, "all else", "whole"):
        table.add_row(part, *(f"{column[part]:.2f}" for column in columns.values()))
    Console(width=140).print(table)


def _settings(method: str) -> dict:
    from llmft.methods._registry import complete_settings

    return complete_settings(method, {})


if __name__ == "__main__":
    main()
