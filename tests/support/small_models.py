"""Tiny random models in hub format. Their weights are large, so that predictions vary with the input."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from llmft.models.architectures import language_model
from llmft.runtime import Runtime
from llmft.tasks._toy_language import toy_data

CPU = Runtime(device="cpu")
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BART_SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
OPT_350M = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}  # its shape: norms behind, narrow embeddings
FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # T5 1.1's shape, which FLAN-T5 has
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = "question: Question: Yes or No? answer: Answer: True or False? Yes No True False yes no Maybe ?\nQuestion: \nAnswer:\n\n"


def toy_text() -> list[str]:
    return [f"{pair.premise} {pair.hypothesis} {WORDS}" for pair in toy_data().train[:300]]


def byte_level_tokenizer(text: Iterable[str], vocabulary_size: int = 600, template: str = "</s> $A") -> PreTrainedTokenizerFast:
    """Like OPT's: bytes, merged; `</s>` opens every text. With the template `<s> $A </s>` like BART's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=template.split()[0], eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def metaspace_tokenizer(text: Iterable[str], vocabulary_size: int = 600) -> PreTrainedTokenizerFast:
    """Like Llama's: `▁` stands for a space, one is put in front of the text, unknown characters become `<unk>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=SPECIAL, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def t5_tokenizer(text: Iterable[str], vocabulary_size: int = 400) -> T5Tokenizer:
    """T5's own: `▁` stands for any white space, `</s>` closes every text. Its pieces are frequent words and single characters."""
    text = list(text)
    n_words, characters = Counter(" ".join(text).split()), sorted({*"".join(text)} - {" ", "\n"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -12.0) for character in ["▁", *characters])]
    frequent = sorted(n_words, key=lambda word: (-n_words[word], word))[: vocabulary_size - len(pieces)]
    pieces += [(f"▁{word}", math.log(n_words[word] / n_words.total())) for word in frequent]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def config(architecture: str, n_words: int, width: int = 32, n_positions: int = 512, std: float = 0.3, **changed):
    """The configuration of a tiny model with two layers."""
    made = {
        "opt": lambda: transformers.OPTConfig(
            hidden_size=width,
            ffn_dim=64,
            max_position_embeddings=n_positions,
            init_std=std,
            **{"word_embed_proj_dim": width} | heads(changed),
        ),
        "gpt2": lambda: transformers.GPT2Config(n_embd=width, n_layer=2, n_head=4, n_positions=n_positions, **changed),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(hidden_size=width, max_position_embeddings=n_positions, **SIZES, **changed),
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
        "gpt_neo": lambda: transformers.GPTNeoConfig(
            hidden_size=width, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8, **changed
        ),
        "gptj": lambda: transformers.GPTJConfig(n_embd=width, n_layer=2, n_head=4, rotary_dim=4, **changed),
        "falcon": lambda: transformers.FalconConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, **changed),
        "phi": lambda: transformers.PhiConfig(hidden_size=width, **SIZES, **changed),
        "qwen2": lambda: transformers.Qwen2Config(hidden_size=width, num_key_value_heads=2, **SIZES, **changed),
        "mamba": lambda: transformers.MambaConfig(hidden_size=width, num_hidden_layers=2, state_size=4, **changed),
        "rwkv": lambda: transformers.RwkvConfig(
            hidden_size=width, num_hidden_layers=2, attention_hidden_size=width, context_length=n_positions, **changed
        ),
        "t5": lambda: transformers.T5Config(
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            n_positions=16,
            dropout_rate=0.0,
            **changed,
        ),
        "bart": lambda: transformers.BartConfig(
            d_model=width,
            max_position_embeddings=n_positions,
            init_std=std,
            dropout=0.0,
            **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in BART_SIZES.items()},
            **changed,
        ),
    }[architecture]()
    made.vocab_size, made.initializer_range = n_words, std
    made.bos_token_id, made.eos_token_id, made.pad_token_id = 2, 2, 1
    if architecture == "t5":
        made.bos_token_id, made.eos_token_id, made.pad_token_id, made.decoder_start_token_id = None, 1, 0, 0
    return made


def heads(changed: dict) -> dict:
    return {"num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0} | changed


def network(configuration, seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = language_model(configuration).from_config(configuration).eval().requires_grad_(False)
        for name, parameter in made.named_parameters():
            if "EncDecAttention" in name or "encoder_attn" in name:  # so that the answer depends on what the encoder read
                parameter.mul_(2.0)
        if not getattr(configuration, "scale_decoder_outputs", True):  # T5 1.1: transformers ties what no weights untie
            head = torch.randn_like(made.lm_head.weight)
            made.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
        return made


def save_model(folder: Path, architecture: str, tokenizer, seed: int = 0, **changed) -> str:
    network(config(architecture, len(tokenizer), **changed), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if "tie_word_embeddings" in changed:  # as the hub's files say it; transformers 5 writes something else
        path = folder / "config.json"
        saved = json.loads(path.read_text()) | {"tie_word_embeddings": changed["tie_word_embeddings"]}
        saved.pop("scale_decoder_outputs", None)
        path.write_text(json.dumps(saved))
    return str(folder)


ENCODER_DECODERS = {"t5": ("t5", {}), "flan": ("t5", FLAN), "bart": ("bart", {})}
"""family: (architecture, changes)"""
