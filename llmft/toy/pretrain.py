"""Make the tiny OPT of `llmft/toy/model`: `python -m llmft.toy.pretrain --out llmft/toy/model`.

The text is episodes: pairs of the toy language rendered with one pattern, each followed by the word of its label. The word after
the first pair of an episode is drawn at random, so that a prompt without demonstrations tells the model nothing, while
demonstrations show it that the pairs are to be judged (task recognition, Pan et al. 2023; it does not learn new label words from
them). No premise of the task's pool or test sets occurs in the text. README.md beside this file says how it went.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from llmft.tasks import NLI_PATTERNS, NLI_VERBALIZERS, Pair, in_domain_pair, toy_data
from llmft.tasks import _toy_language as language

LABEL_WORDS = "Yes No True False".split()
MAX_POSITIONS = 1024
SEPARATOR = "\n\n"


def build_tokenizer(vocabulary_size: int = 1500) -> PreTrainedTokenizerFast:
    """Byte-level BPE like OPT's: any text can be encoded, every word of the language is one token, `</s>` opens the text."""
    words = (
        language.NOUNS
        + language.VERBS
        + language.PREPOSITIONS
        + language.ADVERBS
        + LABEL_WORDS
        + ["people", "and", "or", "question:", "Question:", "answer:", "Answer:", "?"]
    )
    first = language.OPENERS + language.DOUBTS + language.AFFIRMATIONS
    text = [f" {word}" for word in words] + first + [f"\n{word}" for word in ("Question", "Answer")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text * 50 + ["a.\n\nb"] * 50, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
    )


class Episodes:
    """An endless stream of pre-training sequences."""

    def __init__(self, tokenizer, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(f"episodes/{seed}")
        self.held_out = toy_data().premises
        self.before_label = torch.tensor([self._ids(text)[-1] for text in (" ?", " answer:", "\nAnswer:")])
        self.label_ids = torch.tensor([self._ids(" " + word)[0] for word in LABEL_WORDS])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pair(self) -> Pair:
        while True:
            pair = in_domain_pair(self.rng, self.rng.randrange(2))
            if pair.premise not in self.held_out:
                return pair

    def text(self, n_examples: int) -> str:
        """An episode of `n_examples` pairs; the first one's label word says nothing unless it is the only one."""
        pattern = self.rng.choice(list(NLI_PATTERNS.values()))
        words, parts = NLI_VERBALIZERS[pattern.verbalizer], []
        for index in range(n_examples):
            pair = self.pair()
            label = self.rng.randrange(2) if index == 0 and n_examples > 1 else pair.label
            parts.append(pattern.render_labelled({"premise": pair.premise, "hypothesis": pair.hypothesis}, words[label]))
        return SEPARATOR.join(parts)

    def batch(self, n_examples: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [rows, length], where the labels stand [rows, length]), about `n_tokens` in all."""
        texts = [self.text(n_examples) for _ in range(max(1, n_tokens // (20 * n_examples)))]
        ids = torch.tensor(self.tokenizer(texts, padding=True)["input_ids"])
        is_label = torch.isin(ids, self.label_ids)
        is_label[:, 1:] &= torch.isin(ids[:, :-1], self.before_label)  # the words of "Yes or No?" in a pattern are no labels
        is_label[:, 0] = False
        return ids, is_label


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: episodes of up to `n_examples` pairs, until the label accuracy in their second halves reaches `goal`."""

    goal: float
    n_examples: int


CURRICULUM = (Stage(0.87, 1), Stage(0.85, 6), Stage(2.0, 24))


def frequencies(n: int) -> torch.Tensor:
    """Of `n` position waves: three eighths tell neighbours apart (0.15 to 3 rad a token), the rest reach over the context."""
    n_near = 3 * n // 8
    return torch.cat([torch.linspace(3.0, 0.15, n_near), torch.logspace(math.log10(0.15), math.log10(0.006), n - n_near + 1)[1:]])


def sinusoids(n: int, width: int) -> torch.Tensor:
    """Positions as waves [n, width], so that 'k tokens before' is one rotation at every position."""
    angles = torch.arange(n)[:, None] * frequencies(width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def look_back(query: torch.Tensor, key: torch.Tensor, n_back: int, scale: float = 2.0) -> None:
    """Set one head's query and key weights [head size, width] so that it attends `n_back` tokens back."""
    size, width = query.shape
    query.zero_(), key.zero_()
    for row, wave in enumerate(torch.linspace(0, 3 * width // 16 - 1, size // 2).long().tolist()):
        angle = float(frequencies(width // 2)[wave]) * n_back
        sin, cos = wave, width // 2 + wave
        key[2 * row, sin] = key[2 * row + 1, cos] = scale
        query[2 * row, sin], query[2 * row, cos] = scale * math.cos(angle), -scale * math.sin(angle)  # sin(x - angle)
        query[2 * row + 1, cos], query[2 * row + 1, sin] = scale * math.cos(angle), scale * math.sin(angle)  # cos(x - angle)


@torch.no_grad()
def initialise(model: OPTForCausalLM) -> None:
    """Start the heads as what reading demonstrations needs (an induction circuit); so small a model finds it late, if at all.

    In every layer heads 0 and 1 look one and two tokens back. In the first layer head 3 looks for the same word; from the second
    on, head 2 looks for the place whose two-tokens-back is my token-before, and head 3 for the place whose token before was like
    me.
    """
    decoder = model.model.decoder
    decoder.embed_positions.weight.copy_(0.1 * sinusoids(*decoder.embed_positions.weight.shape))
    decoder.embed_tokens.weight.mul_(5)  # OPT's 0.02 is made for wide models
    size = decoder.layers[0].self_attn.head_dim
    heads = [slice(head * size, (head + 1) * size) for head in range(4)]
    before = None
    for layer in decoder.layers:
        attention = layer.self_attn
        q, k, v, out = (getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
        for weight in (q, k, v, layer.fc1.weight):
            weight.mul_(4)
        out.mul_(2)
        v[heads[1]] = v[heads[0]]
        look_back(q[heads[0]], k[heads[0]], n_back=1)
        look_back(q[heads[1]], k[heads[1]], n_back=2)
        if before is not None:
            v_before, out_before = before
            reads = {
                2: (out_before[:, heads[0]].T, out_before[:, heads[1]].T),
                3: (v_before[heads[0]], out_before[:, heads[0]].T),
            }
            for head, (query, key) in reads.items():
                q[heads[head]], k[heads[head]] = 0.13 * query / query.std(), 0.13 * key / key.std()
        else:
            k[heads[3]] = q[heads[3]]  # in the first layer: the same word
        before = v, out


def build_model(tokenizer, width: int, n_layers: int, n_heads: int, ffn: int) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, ffn_dim=ffn, max_position_embeddings=MAX_POSITIONS, dropout=0.0, attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    initialise(model)
    return model


def losses(model, ids: torch.Tensor, is_label: torch.Tensor, start: int, pad: int) -> tuple[torch.Tensor, ...]:
    """(language-model loss, label loss, label accuracy in the episode's second half)."""
    positions = torch.arange(start, start + ids.shape[1])[None].expand(ids.shape[0], -1)
    hidden = model.model.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, :-1]
    target, labels = ids[:, 1:], is_label[:, 1:]
    sampled = (torch.rand(target.shape) < 0.15) & (target != pad) & ~labels  # few text positions: most of the text is noise
    text_logits = model.lm_head(hidden[sampled])
    label_logits = model.lm_head(hidden[labels])
    text = torch.nn.functional.cross_entropy(text_logits.float(), target[sampled])
    label = torch.nn.functional.cross_entropy(label_logits.float(), target[labels])
    late = (torch.arange(target.shape[1]) > target.shape[1] // 2)[None].expand_as(target)[labels]
    correct = (label_logits.argmax(-1) == target[labels])[late].float().mean()
    return text, label, correct


def train(out: Path, steps: int, seed: int, width: int, n_layers: int, n_heads: int, ffn: int, batch_tokens: int, lr: float) -> None:
    """Run the curriculum for `steps` optimiser steps; the learning rate is constant for half of them, then falls to 0 by a cosine."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, width, n_layers, n_heads, ffn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    episodes, rng, began, n_tokens, stage = Episodes(tokenizer, seed), random.Random(seed), time.time(), 0, 0
    running: dict[str, float] = {}
    for step in range(1, steps + 1):
        longest = CURRICULUM[stage].n_examples
        ids, is_label = episodes.batch(longest if rng.random() < 0.6 else rng.randint(min(2, longest), longest), batch_tokens)
        start = 0 if rng.random() < 0.3 else rng.randrange(MAX_POSITIONS - ids.shape[1])
        progress = max(0.0, 2 * step / steps - 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.autocast("cpu", torch.bfloat16):
            text, label, correct = losses(model, ids, is_label, start, tokenizer.pad_token_id)
        (label + 0.3 * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        n_tokens += ids.numel()
        for name, value in (("text_loss", text), ("label_loss", label), ("label_accuracy", correct)):
            running[name] = 0.97 * running.get(name, 0.5) + 0.03 * value.item()
        if running["label_accuracy"] > CURRICULUM[stage].goal:
            stage += 1
            running["label_accuracy"] = 0.5
        if step % 100 == 0 or step == steps:
            entry = {"step": step, "stage": stage, "minutes": round((time.time() - began) / 60, 2), "tokens": n_tokens}
            entry |= {name: round(value, 4) for name, value in running.items()}
            print(json.dumps(entry), flush=True)
        if step % 500 == 0 or step == steps:
            save(model, tokenizer, out)
            (out.parent / "training.json").write_text(json.dumps({"seed": seed, **entry}, indent=1) + "\n")


def save(model, tokenizer, out: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--n-layers", type=int, default=5)
    parser.add_argument("--n-heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    train(**vars(parser.parse_args()))
