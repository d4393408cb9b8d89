"""Context distillation over 40 epochs, against the same training with the teacher run again in every step.

    python benchmarks/distillation.py [--epochs 40] [--unlabelled 32] [--repeats 3]

On the toy model and task, 16 shots in the teacher's prompt. The other side is the same trial, but that what the teacher says is
computed anew for each batch, by the same untouched network from whole prompts. Both must end with the same predictions.
"""

from __future__ import annotations

import argparse
import io

import pyarrow.parquet as parquet
import torch
from pairs import Side, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--unlabelled", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    compare(arguments.epochs, arguments.unlabelled, arguments.repeats)


def compare(epochs: int, n_unlabelled: int, repeats: int) -> None:
    from llmft.config.spec import TrainSpec, TrialSpec
    from llmft.methods._registry import complete_settings
    from llmft.methods.context_distillation import ContextDistillation
    from llmft.models.batches import make_batch
    from llmft.models.info import resolve_model
    from llmft.models.loading import borrow_model
    from llmft.prompting.encoding import INPUTS
    from llmft.runtime import Runtime
    from llmft.trial.preparation import encode_teacher_prompts, prepare_trial
    from llmft.trial.run import run_trial

    settings = complete_settings("context_distillation", {"n_unlabelled": n_unlabelled})
    spec = TrialSpec(
        model=resolve_model("toy"), task="toy", method="context_distillation", settings=settings, n_shots=16, n_dev=0, n_test=64,
        train=TrainSpec(epochs=epochs, batch_size=32, learning_rate=1e-4), selections=("last",),
    )  # fmt: skip
    cpu = torch.device("cpu")
    setting = prepare_trial(spec)
    (lesson,) = encode_teacher_prompts(spec, setting)

    def ours():
        return predictions(run_trial(spec, Runtime(device="cpu")))

    def predictions(result):
        assert result.record.finished, result.record.message
        return torch.tensor([row["label_log_probabilities"] for row in parquet.read_table(io.BytesIO(result.predictions)).to_pylist()])

    def taught_in_every_step():
        with borrow_model(spec.model, "fp32", cpu, copied=False) as teacher:
            loss = ContextDistillation.loss

            def loss_with_teacher(method, model, batch):
                rows = batch.indices.tolist()
                with torch.no_grad():
                    prompts = make_batch(lesson.sets[INPUTS], rows, setting.words, teacher, prefix_ids=lesson.prefix)
                    for name, said in method.targets(teacher, prompts).items():
                        method.teacher_targets[name][rows] = said
                return loss(method, model, batch)

            ContextDistillation.loss = loss_with_teacher
            try:
                return ours()
            finally:
                ContextDistillation.loss = loss

    ours()
    mine, other = Side("llmft, taught once", ours), Side("taught in every step", taught_in_every_step)
    measure(mine, [other], repeats, f"context distillation, {epochs} epochs, {n_unlabelled} inputs")
    away = (mine.found - other.found).abs().max().item()
    print(f"log-probabilities differ by {away:.1e} at most; they spread by {mine.found[:, 0].std():.3f}")
    assert away < 1e-2  # rounding, grown over the steps


if __name__ == "__main__":
    main()
