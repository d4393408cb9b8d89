"""What `llmft plan` says that trials need, against what they took: real trials on this machine's CPU, each in a fresh process.

    python benchmarks/memory.py --data-dir FOLDER_WITH_RTE [--only opt-125m]

The models have the shapes of the named ones and random weights. Measured is the growth of the resident set over a process that
holds the base model already (`record.cost.peak_memory_bytes`); estimated is `Memory.cpu_bytes` without the base model. glibc is
told to give freed memory back at once, or the resident set would hold blocks that nobody uses (--default-malloc: up to a third
more was seen).

On two cores, torch 2.13, MiB (the rows of in_context are from before its queries shared one prefix, and took more then):

    model        method     shots batch  estimated measured  MiB   ratio
    opt-125m     zero_shot      0     1        579      591        0.98
    opt-125m     zero_shot      0     1        551      552        1.00  precision=bf16
    opt-125m     in_context     4     1      1,160    1,176        0.99
    opt-125m     in_context    16     1        780      798        0.98
    opt-125m     vanilla        2     2      2,695    2,711        0.99
    opt-125m     pattern        4     4      2,683    2,707        0.99
    opt-125m     pattern        8     8      2,206    2,232        0.99  selections=('last',)
    opt-125m     pattern       16    16      3,204    3,231        0.99
    opt-125m     pattern       16    16      2,683    2,710        0.99  gradient_checkpointing=True
    opt-125m     pattern        8     8      2,683    2,702        0.99  precision=bf16
    opt-125m     lora           4     4        575      597        0.96
    opt-125m     lora          16    16      1,538    1,564        0.98
    opt-125m     lora          16    16        694      720        0.96  gradient_checkpointing=True
    opt-350m     pattern        4     4      6,513    6,543        1.00
    opt-350m     lora           8     8      2,110    2,142        0.99
    opt-350m     in_context     4     1        578      595        0.97
    gpt2         pattern        8     8      2,864    2,887        0.99
    gpt2         lora          16    16      2,874    2,896        0.99
    gpt2         in_context     8     1        445      463        0.96
    pythia-160m  pattern        8     8      3,391    3,504        0.97
    pythia-160m  lora           8     8        915    1,031        0.89
    pythia-160m  zero_shot      0     1        527      570        0.93
    estimated / measured: mean 0.98, 0.89 to 1.00; mean error 2%
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "opt-125m": ("OPTConfig", {}),
    "opt-350m": (
        "OPTConfig",
        {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    ),
    "gpt2": ("GPT2Config", {}),
    "pythia-160m": (
        "GPTNeoXConfig",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50304},
    ),
}  # fmt: skip
CASES = [  # model, method, shots, batch size, changes
    ("opt-125m", "zero_shot", 0, 1, {"n_test": 128}),
    ("opt-125m", "zero_shot", 0, 1, {"n_test": 32, "precision": "bf16"}),
    ("opt-125m", "in_context", 4, 1, {"n_test": 32}),
    ("opt-125m", "in_context", 16, 1, {"n_test": 8}),
    ("opt-125m", "vanilla", 2, 2, {}),
    ("opt-125m", "pattern", 4, 4, {}),
    ("opt-125m", "pattern", 8, 8, {"selections": ("last",)}),
    ("opt-125m", "pattern", 16, 16, {}),
    ("opt-125m", "pattern", 16, 16, {"gradient_checkpointing": True}),
    ("opt-125m", "pattern", 8, 8, {"precision": "bf16"}),
    ("opt-125m", "lora", 4, 4, {}),
    ("opt-125m", "lora", 16, 16, {}),
    ("opt-125m", "lora", 16, 16, {"gradient_checkpointing": True}),
    ("opt-350m", "pattern", 4, 4, {}),
    ("opt-350m", "lora", 8, 8, {}),
    ("opt-350m", "in_context", 4, 1, {"n_test": 8}),
    ("gpt2", "pattern", 8, 8, {}),
    ("gpt2", "lora", 16, 16, {}),
    ("gpt2", "in_context", 8, 1, {"n_test": 8}),
    ("pythia-160m", "pattern", 8, 8, {}),
    ("pythia-160m", "lora", 8, 8, {}),
    ("pythia-160m", "zero_shot", 0, 1, {"n_test": 64}),
]


def make_model(name: str, folder: Path, data_dir: str) -> None:
    """A folder in hub format: the shape with random weights, and a byte-level tokenizer of RTE's words."""
    import pyarrow.parquet as parquet
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rows = parquet.read_table(Path(data_dir) / "rte_train.parquet").to_pylist()
    core.train_from_iterator(
        [f"{row['sentence1']} question: {row['sentence2']} Yes No" for row in rows],
        trainers.BpeTrainer(vocab_size=30000, special_tokens=["<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )  # fmt: skip
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="</s>").save_pretrained(
        folder
    )
    config, changes = SHAPES[name]
    transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**changes)).save_pretrained(folder)


def plan_of(folder: str, data_dir: str, method: str, n_shots: int, batch_size: int, changes: dict) -> dict:
    train = {"epochs": 2, "batch_size": batch_size}
    train |= {name: value for name, value in changes.items() if name == "gradient_checkpointing"}
    entry = {} if method == "zero_shot" else {"n_shots": [n_shots]}
    return {
        "models": [folder], "tasks": ["rte"], "data_dir": data_dir, "methods": {method: entry}, "pattern": "gpt-3", "train": train,
        "report": {"seeds": [0]}, "n_dev": 8, "n_test": 4, "test_sets": ["rte"],
    } | {name: value for name, value in changes.items() if name not in train}  # fmt: skip


def measure(content: dict) -> dict[str, int]:
    """Estimate and measurement of one case, in this process."""
    from llmft.runtime import Runtime
    from llmft.trial.run import run_trial
    from sweeps.planning.expand import build_cells
    from sweeps.planning.loader import parse_plan
    from sweeps.resources.memory import estimate_memory
    from sweeps.resources.network_sizes import count_networks
    from sweeps.resources.workload import largest_workload

    (cell,) = build_cells(parse_plan(content, "benchmark"))
    work = largest_workload([cell])
    memory = estimate_memory(work, count_networks(work), on_gpu=False)
    first = {**content, "methods": {"zero_shot": None}, "n_test": 2, "n_dev": 2, "selections": ("last",)}
    (warm_up,) = build_cells(parse_plan(first, "benchmark"))
    run_trial(warm_up.base, Runtime(device="cpu"))
    record = run_trial(cell.base, Runtime(device="cpu")).record
    if not record.finished:
        raise SystemExit(record.message)
    return {"estimated": memory.cpu_bytes - memory.base_bytes, "measured": record.cost.peak_memory_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="holds rte_train.parquet, rte_validation.parquet and hans.parquet")
    parser.add_argument("--only", choices=SHAPES, help="one model")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
        return
    environment = dict(os.environ) if arguments.default_malloc else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ratios = []
    print(f"{'model':12} {'method':10} {'shots':>5} {'batch':>5}  {'estimated':>9} {'measured':>8}  MiB   ratio")
    with tempfile.TemporaryDirectory() as scratch:
        for name, method, n_shots, batch_size, changes in CASES:
            if arguments.only not in (None, name):
                continue
            if not (folder := Path(scratch) / name).exists():
                make_model(name, folder, arguments.data_dir)
            content = plan_of(str(folder), arguments.data_dir, method, n_shots, batch_size, changes)
            done = subprocess.run(
                [sys.executable, __file__, "--case", json.dumps(content)], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )  # fmt: skip
            sizes = json.loads(done.stdout.splitlines()[-1])
            ratios.append(sizes["estimated"] / sizes["measured"])
            shown = " ".join(f"{key}={value}" for key, value in changes.items() if key != "n_test")
            print(
                f"{name:12} {method:10} {n_shots:5} {batch_size:5}  {sizes['estimated'] / 2**20:9,.0f} "
                f"{sizes['measured'] / 2**20:8,.0f}        {ratios[-1]:.2f}  {shown}",
                flush=True,
            )
    away = statistics.fmean(abs(ratio - 1) for ratio in ratios)
    print(f"estimated / measured: mean {statistics.fmean(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}; mean error {away:.0%}")


if __name__ == "__main__":
    main()
