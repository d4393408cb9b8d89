"""Make the tiny OPT of `llmft/toy/model`: `python -m llmft.toy.pretrain --out llmft/toy/model`.

The text is episodes: pairs of the toy language rendered with one pattern, each followed by a label word. Which word stands
for which label is drawn anew for every episode, and in some episodes another rule than entailment decides the label, so that
a prompt without demonstrations tells nothing and the demonstrations tell rule and words. The curriculum starts with fixed
label words (learn the feature), goes on to drawn ones (learn to read the demonstrations), and ends with the full mixture.
No premise of the task's pool or test sets occurs in the text.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from llmft.toy import language
from llmft.toy.language import Pair, in_domain_pair, toy_data

LABEL_WORDS = (
    "Yes No True False yes no good bad right wrong hot cold up down red blue left high low one two same other Maybe".split()
)
PATTERNS = (
    "{premise} {hypothesis} ?",
    "{premise} question: {hypothesis} Yes or No? answer:",
    "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:",
)
MAX_POSITIONS = 1024
SEPARATOR = "\n\n"
Rule = Callable[[Pair], int]


def entailed(pair: Pair) -> int:
    return pair.label


def has_adverb(pair: Pair) -> int:
    return int(pair.premise.rstrip(".").split()[-1] in language.ADVERBS)


def opens_today(pair: Pair) -> int:
    return int(pair.premise.split()[0] in ("Today", "Once"))


def two_agents(pair: Pair) -> int:
    return int(" and " in pair.premise)


OTHER_RULES: tuple[Rule, ...] = (has_adverb, opens_today, two_agents)


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
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
    )


@dataclass(frozen=True)
class Kind:
    """What an episode is made of.

    Attributes:
        n_examples: examples per episode; an episode is one sequence.
        of: "pairs" (premise and hypothesis), or single words: "recall" (two words, each with its label) or "classes" (nouns
            against words of another class). The word episodes are what teaches a small model to read demonstrations at all.
        n_words: how many of the label words are in use (2: always Yes and No).
        fixed: " Yes" always stands for label 0 and " No" for label 1.
        other_rules: share of the episodes of pairs in which another rule than entailment decides the label.
    """

    n_examples: int
    of: str = "pairs"
    n_words: int | None = None
    fixed: bool = False
    other_rules: float = 0.0


class Episodes:
    """An endless stream of pre-training sequences."""

    def __init__(self, tokenizer, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(f"episodes/{seed}")
        self.held_out = toy_data().premises
        self.before_label = torch.tensor([self._ids(text)[-1] for text in (" ?", " answer:", "\nAnswer:")])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pair(self) -> Pair:
        while True:
            pair = in_domain_pair(self.rng, self.rng.randrange(2))
            if pair.premise not in self.held_out:
                return pair

    def _pairs(self, kind: Kind) -> Callable[[int], str]:
        """A function that renders a new query with the wanted label."""
        rule = self.rng.choice(OTHER_RULES) if self.rng.random() < kind.other_rules else entailed
        pattern = self.rng.choice(PATTERNS)

        def render(wanted: int) -> str:
            pair = self.pair()
            while rule(pair) != wanted:
                pair = self.pair()
            return pattern.format(premise=pair.premise, hypothesis=pair.hypothesis)

        return render

    def _words(self, kind: Kind) -> Callable[[int], str]:
        classes = [language.NOUNS, self.rng.choice((language.VERBS, language.ADVERBS, language.PREPOSITIONS))]
        if kind.of == "recall":
            classes = [[word] for word in self.rng.sample(language.NOUNS + language.VERBS, 2)]
        self.rng.shuffle(classes)
        return lambda wanted: f"a {self.rng.choice(classes[wanted])} ?"  # after a space, where each word is one token

    def text(self, kind: Kind) -> tuple[str, tuple[str, str]]:
        """An episode and the two label words that it uses."""
        words = ("Yes", "No") if kind.fixed else tuple(self.rng.sample(LABEL_WORDS[: kind.n_words], 2))
        render = self._pairs(kind) if kind.of == "pairs" else self._words(kind)
        labels = [self.rng.randrange(2) for _ in range(kind.n_examples)]
        return SEPARATOR.join(f"{render(label)} {words[label]}" for label in labels), words

    def batch(self, kind: Kind, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [rows, length], where the labels stand [rows, length]), about `n_tokens` in all."""
        texts = [self.text(kind) for _ in range(max(1, n_tokens // ((20 if kind.of == "pairs" else 6) * kind.n_examples)))]
        encoded = self.tokenizer([text for text, _ in texts], padding=True)
        ids = torch.tensor(encoded["input_ids"])
        is_label = torch.zeros_like(ids, dtype=torch.bool)
        for row, (_, words) in enumerate(texts):
            is_label[row] = torch.isin(ids[row], torch.tensor([self._ids(" " + word)[0] for word in words]))
        is_label[:, 1:] &= torch.isin(ids[:, :-1], self.before_label)  # the words of "Yes or No?" in a pattern are no labels
        is_label[:, 0] = False
        return ids, is_label


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum; it ends when the label accuracy in the second halves of its main episodes reaches `goal`.

    `reach`: sequences start at a position below it, so that all positions are learned, the first ones first.
    """

    goal: float
    reach: int
    main: Kind
    others: tuple[Kind, ...] = ()


RECALL, CLASSES, FIXED = Kind(6, "recall"), Kind(12, "classes"), Kind(1, n_words=2, fixed=True)
CURRICULUM = (
    Stage(0.93, 1, Kind(6, "recall", n_words=2)),
    Stage(0.93, 64, Kind(6, "recall", n_words=2)),
    Stage(0.93, MAX_POSITIONS, Kind(6, "recall", n_words=2)),
    Stage(0.90, MAX_POSITIONS, Kind(6, "recall", n_words=6)),
    Stage(0.88, MAX_POSITIONS, RECALL),
    Stage(0.88, MAX_POSITIONS, CLASSES, (RECALL,)),
    Stage(0.87, MAX_POSITIONS, FIXED, (CLASSES,)),
    Stage(0.82, MAX_POSITIONS, Kind(8, n_words=2), (CLASSES, FIXED, Kind(8, n_words=2, other_rules=1.0))),
    Stage(0.82, MAX_POSITIONS, Kind(12), (CLASSES, FIXED, Kind(12, other_rules=1.0))),
    Stage(2.00, MAX_POSITIONS, Kind(18, other_rules=0.2), (CLASSES,)),
)


def frequencies(n: int) -> torch.Tensor:
    """Of `n` position waves: three eighths tell neighbours apart (0.15 to 3 rad a token), the rest reach over the context."""
    n_near = 3 * n // 8
    return torch.cat(
        [torch.linspace(3.0, 0.15, n_near), torch.logspace(math.log10(0.15), math.log10(0.006), n - n_near + 1)[1:]]
    )


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

    In every layer heads 0 and 1 look one and two tokens back. From the second layer on, head 2 looks for the place whose
    two-tokens-back is my token-before (in "a kings ? hot ... a kings ?" the second "?" finds "hot"), and head 3 for the place
    whose token before was like me (the same with what earlier layers have gathered at a "?").
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


EARLY = 3
"""Layers after which the fixed-word episodes must know the label: the others compare it with the demonstrations' labels."""


def losses(model, ids: torch.Tensor, is_label: torch.Tensor, start: int, pad: int, early: bool) -> tuple[torch.Tensor, ...]:
    """(language-model loss, label loss, label accuracy in the episode's second half); `early` also asks for the label after EARLY layers."""
    positions = torch.arange(start, start + ids.shape[1])[None].expand(ids.shape[0], -1)
    output = model.model.decoder(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=early)
    hidden, target, labels = output.last_hidden_state[:, :-1], ids[:, 1:], is_label[:, 1:]
    sampled = (torch.rand(target.shape) < 0.15) & (target != pad) & ~labels  # few text positions: most of the text is noise
    text_logits = model.lm_head(hidden[sampled])
    label_logits = model.lm_head(hidden[labels])
    text = torch.nn.functional.cross_entropy(text_logits.float(), target[sampled])
    label = torch.nn.functional.cross_entropy(label_logits.float(), target[labels])
    if early:
        states = model.model.decoder.final_layer_norm(output.hidden_states[EARLY][:, :-1][labels])
        label = label + torch.nn.functional.cross_entropy(model.lm_head(states).float(), target[labels])
    late = (torch.arange(target.shape[1]) > target.shape[1] // 2)[None].expand_as(target)[labels]
    correct = (label_logits.argmax(-1) == target[labels])[late].float().mean()
    return text, label, correct


def train(
    out: Path, minutes: float, seed: int, width: int, n_layers: int, n_heads: int, ffn: int, batch_tokens: int, lr: float
) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, width, n_layers, n_heads, ffn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    episodes, stage = Episodes(tokenizer, seed), 0
    rng, began, step, n_tokens, log = random.Random(seed), time.time(), 0, 0, []
    running: dict[str, float] = {}
    while (progress := (time.time() - began) / 60 / minutes) < 1:
        current = CURRICULUM[stage]
        kind = current.main if not current.others or rng.random() < 0.6 else rng.choice(current.others)
        ids, is_label = episodes.batch(kind, batch_tokens)
        start = 0 if rng.random() < 0.3 else rng.randrange(min(current.reach, MAX_POSITIONS - ids.shape[1]))
        for group in optimizer.param_groups:
            group["lr"] = (
                lr
                * min(1.0, (step + 1) / 200)
                * (1.0 if progress < 0.6 else 0.5 * (1 + math.cos(math.pi * (progress - 0.6) / 0.4)) + 0.02)
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=True):
            text, label, correct = losses(model, ids, is_label, start, tokenizer.pad_token_id, early=kind.fixed)
        (label + 0.3 * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, n_tokens = step + 1, n_tokens + ids.numel()
        which = "main" if kind is current.main else "rule" if kind.other_rules == 1 else "fixed" if kind.fixed else kind.of
        for name, value in (("text_loss", text), ("label_loss", label), (f"{which}_accuracy", correct)):
            running[name] = 0.97 * running.get(name, 0.5) + 0.03 * value.item()
        if running.get("main_accuracy", 0) > current.goal:
            stage += 1
            running["main_accuracy"] = 0.5
            print(json.dumps({"stage": stage, "step": step, "tokens": n_tokens}), flush=True)
        if step % 100 == 0:
            entry = {"stage": stage, "step": step, "minutes": round((time.time() - began) / 60, 2), "tokens": n_tokens}
            entry |= {name: round(value, 4) for name, value in running.items()}
            log.append(entry)
            print(json.dumps(entry), flush=True)
        if step % 1000 == 0:
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    (out / "training.json").write_text(json.dumps({"seed": seed, "threads": torch.get_num_threads(), **log[-1]}, indent=1))


def save(model, tokenizer, out: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--n-layers", type=int, default=6)
    parser.add_argument("--n-heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=1e-3)
    train(**vars(parser.parse_args()))
