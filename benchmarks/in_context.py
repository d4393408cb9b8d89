"""In-context evaluation: RTE validation, 16 shots, against lm-evaluation-harness and against the way of uds-lsv/llmft.

    python benchmarks/in_context.py --data-dir FOLDER_WITH_RTE [--sample 16] [--repeats 3]

Ours is the whole trial: prompts, prefix, all 277 queries, record. The others get the prompts as text and run `--sample` of them,
spread over the lengths; their time grows with the number of prompts and is scaled up (`--sample 277` runs all). The harness gets
the same budget of tokens a batch. The way of uds-lsv/llmft: prompts padded to 2,048 tokens, 10 at a time, logits of all places.
All must give every label word the same log-probability, within 1e-4 (restricted to the two words).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from pairs import Side, measure
from rte import data_parser, save_opt, spec_of

N_SHOTS, PER_DEVICE, PADDED = 16, 10, 2048


def rendered(spec) -> tuple[list[str], tuple[str, ...]]:
    """The prompts as text, and the words with what stands before them."""
    from llmft.config.patterns import render_prompt
    from llmft.trial.preparation import encode_prompts, prepare_trial

    setting = prepare_trial(spec)
    encoded, pattern, words = encode_prompts(spec, setting), setting.task.patterns[spec.pattern], setting.words.texts
    shown = [(example.fields, words[example.label]) for example in encoded.demonstrations]
    texts = [render_prompt(pattern, shown, example.fields, spec.separator) for example in setting.tests[0].examples]
    return texts, tuple(pattern.label_prefix + word for word in words)


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--sample", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        save_opt(folder := Path(scratch) / "opt", arguments.data_dir)
        compare(folder, arguments.data_dir, arguments.sample, arguments.repeats)


def compare(folder: Path, data_dir: str, n_sample: int, repeats: int) -> None:
    import io

    import pyarrow.parquet as parquet
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmft.runtime import Runtime
    from llmft.trial.run import run_trial

    spec = spec_of(folder, data_dir, method="in_context", n_shots=N_SHOTS)
    texts, words = rendered(spec)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    chosen = [by_length[round(i * (len(texts) - 1) / (n_sample - 1))] for i in range(n_sample)]
    longest = max(len(tokenizer(texts[i])["input_ids"]) for i in chosen)
    budget = Runtime().micro_batch_tokens
    harness = HFLM(pretrained=network, tokenizer=tokenizer, backend="causal", batch_size=budget // longest, max_length=PADDED)

    def of_harness():
        requests = [Instance("loglikelihood", {}, (texts[i], word), n) for i in chosen for n, word in enumerate(words)]
        found = [total for total, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        return torch.tensor(found).view(len(chosen), -1).log_softmax(-1)

    @torch.no_grad()
    def of_the_original():
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
        found = []
        for start in range(0, len(chosen), PER_DEVICE):
            group = [texts[i] for i in chosen[start : start + PER_DEVICE]]
            batch = tokenizer(group, padding="max_length", max_length=PADDED, return_tensors="pt")
            logits = network(**batch).logits
            last = batch["attention_mask"].sum(-1) - 1
            found.append(logits[torch.arange(len(group)), last][:, ids].log_softmax(-1))
        return torch.cat(found)

    def ours():
        result = run_trial(spec, Runtime(device="cpu"))
        assert result.record.finished, result.record.message
        rows = parquet.read_table(io.BytesIO(result.predictions)).to_pylist()
        return torch.tensor([rows[i]["label_log_probabilities"] for i in chosen])

    ours()  # the base model and the data are loaded then, as in a worker that has run a trial
    times = len(texts) / n_sample
    sides = [Side("lm-evaluation-harness", of_harness, times), Side("uds-lsv/llmft", of_the_original, times)]
    mine = Side("llmft", ours)
    measure(mine, sides, repeats, f"in-context, {N_SHOTS} shots, prompts of up to {longest} tokens, {len(texts)} queries")
    for side in sides:
        away = (side.found - mine.found).abs().max().item()
        same = (side.found.argmax(1) == mine.found.argmax(1)).all().item()
        print(f"{side.name}: log-probabilities differ by {away:.1e} at most, {'the same' if same else 'OTHER'} predictions")
        assert away < 1e-4 and same
    print(f"spread of the log-probabilities over queries: {mine.found[:, 0].std():.3f}")


if __name__ == "__main__":
    main()
