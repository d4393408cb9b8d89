"""What the benchmarks run on: RTE, and a 6-layer OPT, 256 wide, with the real vocabulary of 50,272 words and random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as parquet

N_WORDS, WIDTH, N_LAYERS, N_POSITIONS = 50272, 256, 6, 2048


def data_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="holds rte_train.parquet and rte_validation.parquet")
    return parser


def save_opt(folder: Path, data_dir: str) -> None:
    """A folder in hub format. Its tokenizer is byte-level BPE, as OPT's, of the words of RTE; its weights are large enough for its
    predictions to vary."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rows = parquet.read_table(Path(data_dir) / "rte_train.parquet").to_pylist()
    core.train_from_iterator(
        (f"{row['sentence1']} {row['sentence2']} Yes No\n\n" for row in rows),
        trainers.BpeTrainer(
            vocab_size=20000, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    core.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="</s>").save_pretrained(
        folder
    )
    config = transformers.OPTConfig(
        vocab_size=N_WORDS, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=4 * WIDTH, num_hidden_layers=N_LAYERS,
        num_attention_heads=8, max_position_embeddings=N_POSITIONS, init_std=0.1, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def spec_of(folder: Path, data_dir: str, **fields):
    """A trial on RTE alone, with nothing held out for dev."""
    from llmft.config.spec import TrialSpec
    from llmft.models.info import resolve_model
    from llmft.tasks._registry import load_task

    usual = {"task": "rte", "pattern": "gpt-3", "n_dev": 0, "test_sets": ("rte",), "selections": ("last",)}
    model, data = resolve_model(str(folder)), load_task("rte").resolve_data(data_dir)
    return TrialSpec(**usual | {"model": model, "data": data} | fields)
