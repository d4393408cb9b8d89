"""Pattern-based fine-tuning on RTE in batches of 32: steps a second, against three other ways to take the same steps.

    python benchmarks/training.py --data-dir FOLDER_WITH_RTE [--epochs 2] [--repeats 3]

All train on the same 128 examples in the same order with AdamW, gradients clipped, dropout 0, and the same loss: the cross-entropy
of the label word among all words at the answer's place. The way of uds-lsv/llmft pads to 256 tokens and computes logits of all places. The
`Trainer` of transformers pads to the longest of the batch; in its plain form it takes the network's logits of all places, in its
careful form those of the answer's place (`logits_to_keep` of a model with padding on the left). All must move the weights alike:
key biases aside, whose gradient is zero but for rounding, which AdamW makes steps of.

What is compared is the median time from one step of the optimiser to the next, so that neither loading a model nor what a trial does
beside its training counts. A repeat of the first side takes `--epochs` epochs, as the others do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from pairs import Timed, measure
from rte import data_parser, save_opt, spec_of
from torch.optim.optimizer import register_optimizer_step_post_hook

BATCH, PADDED, RATE = 32, 256, 1e-4


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--shots", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        save_opt(folder := Path(scratch) / "opt", arguments.data_dir)
        compare(folder, arguments.data_dir, arguments.shots, arguments.epochs, arguments.repeats, scratch)


def compare(folder: Path, data_dir: str, n_shots: int, epochs: int, repeats: int, scratch: str) -> None:
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from llmft.config.spec import TrainSpec
    from llmft.prompting.encoding import SHOTS
    from llmft.runtime import Runtime
    from llmft.seeds import stream
    from llmft.trial.preparation import encode_prompts, prepare_trial
    from llmft.trial.run import run_trial

    train = TrainSpec(
        learning_rate=RATE, epochs=epochs, batch_size=BATCH, warmup_ratio=0.0, schedule="constant", clip_norm=1.0, dropout=0.0
    )
    spec = spec_of(folder, data_dir, method="pattern", n_shots=n_shots, train=train, n_test=2)
    setting = prepare_trial(spec)
    encoded = encode_prompts(spec, setting)
    shots, opening = encoded.sets[SHOTS], encoded.prefix_of(SHOTS)
    words = torch.tensor([ids[0] for ids in setting.words.ids])
    order = stream(spec.order_seed, "batches")
    rows = [int(i) for _ in range(epochs) for i in order.permutation(len(shots))]
    examples = [{"input_ids": [*opening, *shots.suffixes[i]], "label": shots.labels[i]} for i in rows]
    n_steps = epochs * -(-len(shots) // BATCH)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def collate(group, length=None, side="right"):
        longest = length or max(len(example["input_ids"]) for example in group)
        batch = {"input_ids": [], "attention_mask": []}
        for example in group:
            ids, padding = example["input_ids"], [tokenizer.pad_token_id] * (longest - len(example["input_ids"]))
            batch["input_ids"].append(ids + padding if side == "right" else padding + ids)
            mask = [1] * len(ids)
            batch["attention_mask"].append(mask + [0] * len(padding) if side == "right" else [0] * len(padding) + mask)
        return {name: torch.tensor(values) for name, values in batch.items()} | {
            "answers": torch.tensor([example["label"] for example in group])
        }

    def loss_of_all_places(network, batch):
        answers = batch.pop("answers")
        logits = network(**batch).logits
        last = batch["attention_mask"].sum(-1) - 1
        return F.cross_entropy(logits[torch.arange(len(last)), last], words[answers])

    def loss_of_the_answer(network, batch):
        answers = batch.pop("answers")
        return F.cross_entropy(network(**batch, logits_to_keep=1).logits[:, -1], words[answers])

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dropout=0.0).train()

    def optimizer(network):
        return torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def of_the_original():
        network = load()
        stepper = optimizer(network)
        for start in range(0, len(examples), BATCH):
            loss_of_all_places(network, collate(examples[start : start + BATCH], PADDED)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            stepper.step()
            stepper.zero_grad()
        return network.state_dict()

    def of_trainer(loss, side):
        class AtAnswer(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return loss(model, inputs)

            def _get_train_sampler(self, *args):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        def work():
            network = load()
            how = TrainingArguments(
                scratch, per_device_train_batch_size=BATCH, num_train_epochs=1, max_grad_norm=1.0, save_strategy="no", report_to=[],
                remove_unused_columns=False, use_cpu=True, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant",
            )  # fmt: skip
            AtAnswer(
                network,
                how,
                lambda group: collate(group, side=side),
                train_dataset=examples,
                optimizers=(optimizer(network), None),
            ).train()
            return network.state_dict()

        return work

    def ours():
        result = run_trial(spec, Runtime(device="cpu", keep_weights=True))
        assert result.record.finished and result.record.cost.n_steps == n_steps, result.record.message
        return result.weights

    mine = Timed("llmft", a_step(ours))
    others = [
        Timed("uds-lsv/llmft", a_step(of_the_original)),
        Timed("Trainer", a_step(of_trainer(loss_of_all_places, "right"))),
        Timed("Trainer, careful", a_step(of_trainer(loss_of_the_answer, "left"))),
    ]
    ours()
    measure(mine, others, repeats, f"a step of pattern, {n_shots} shots, batches of {BATCH}, the median of {n_steps - 1}")
    start = load().state_dict()
    trained = ours_tensors(mine.found)
    trained = {name: tensor for name, tensor in trained.items() if not name.endswith("k_proj.bias")}
    moved = norm(tensor - start[name] for name, tensor in trained.items())
    for side in others:
        away = norm(tensor - side.found[name] for name, tensor in trained.items()) / moved
        print(f"{side.name}: its step through the weights differs from ours by {away:.1e} of its length")
        assert away < 0.02


def a_step(train: Callable[[], object]) -> Callable[[], tuple[object, float, float]]:
    """`train`, and the median wall and CPU seconds between two steps of its optimiser."""

    def work():
        stamps = []
        hook = register_optimizer_step_post_hook(lambda *_: stamps.append((time.perf_counter(), time.process_time())))
        try:
            found = train()
        finally:
            hook.remove()
        between = [[now - before for now, before in zip(*pair, strict=True)] for pair in zip(stamps[1:], stamps, strict=False)]
        wall, cpu = (statistics.median(seconds) for seconds in zip(*between, strict=True))
        return found, wall, cpu

    return work


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def ours_tensors(weights: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(weights)


if __name__ == "__main__":
    main()
