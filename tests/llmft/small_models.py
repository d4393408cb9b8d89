"""Tiny random models in hub format. Their weights are large, so that predictions vary with the input."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmft.runtime import Runtime
from llmft.toy.language import toy_data

CPU = Runtime(device="cpu")
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = (
    "question: Question: Yes or No? answer: Answer: True or False? Yes No True False yes no Maybe ?\nQuestion: \nAnswer:\n\n"
)


def toy_text() -> list[str]:
    return [f"{pair.premise} {pair.hypothesis} {WORDS}" for pair in toy_data().train[:300]]


def byte_level_tokenizer(text: Iterable[str], vocabulary_size: int = 600) -> PreTrainedTokenizerFast:
    """Like OPT's: bytes, merged; `</s>` opens every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def metaspace_tokenizer(text: Iterable[str], vocabulary_size: int = 600) -> PreTrainedTokenizerFast:
    """Like Llama's: `▁` stands for a space, one is put in front of the text, unknown characters become `<unk>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def config(architecture: str, n_words: int, width: int = 32, n_positions: int = 512, std: float = 0.3, **changed):
    """The configuration of a tiny model with two layers."""
    made = {
        "opt": lambda: transformers.OPTConfig(
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=64,
            max_position_embeddings=n_positions,
            init_std=std,
            **heads(changed),
        ),
        "gpt2": lambda: transformers.GPT2Config(n_embd=width, n_layer=2, n_head=4, n_positions=n_positions, **changed),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            hidden_size=width, max_position_embeddings=n_positions, **SIZES, **changed
        ),
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=width, num_key_value_heads=2, max_position_embeddings=n_positions, **SIZES, **changed
        ),
        "gemma2": lambda: transformers.Gemma2Config(
            hidden_size=width, num_key_value_heads=2, head_dim=8, max_position_embeddings=n_positions, **SIZES, **changed
        ),
        "granite": lambda: transformers.GraniteConfig(
            hidden_size=width, num_key_value_heads=2, max_position_embeddings=n_positions, **SIZES, **changed
        ),
        "mistral": lambda: transformers.MistralConfig(
            hidden_size=width, num_key_value_heads=2, max_position_embeddings=n_positions, **SIZES, **changed
        ),
        "bloom": lambda: transformers.BloomConfig(hidden_size=width, n_layer=2, n_head=4, **changed),
    }[architecture]()
    made.vocab_size, made.initializer_range = n_words, std
    made.bos_token_id, made.eos_token_id, made.pad_token_id = 2, 2, 1
    return made


def heads(changed: dict) -> dict:
    return {"num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0} | changed


def network(configuration, seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(configuration).eval().requires_grad_(False)


def save_model(folder: Path, architecture: str, tokenizer, seed: int = 0, **changed) -> str:
    network(config(architecture, len(tokenizer), **changed), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
