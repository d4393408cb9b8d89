"""Find the model that a name means, and read what a trial must know of it before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmft.config import ModelRef
from llmft.errors import UserError
from llmft.hub import fetch_model, pin
from llmft.models.architectures import decoder_start_token, shares_prefix
from llmft.models.loading import load_config, load_tokenizer
from llmft.prompting import decoder_start

TOY = Path(__file__).parents[1] / "toy" / "model"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
SAMPLE = 1 << 20  # bytes from either end of a weights file that its fingerprint reads
UNBOUNDED = 1 << 30  # tokens: the context length of a model whose positions have no bound


def resolve_model(name: str, revision: str = "main") -> ModelRef:
    """The model that `name` means: "toy", a local folder in hub format, or a hub name.

    A hub model is known by its commit, which becomes its `revision`: under the name of a branch, one digest would stand for
    whatever the branch held at the time. A commit that changes nothing but a description is another model all the same; one
    would have to ask the hub for every file's hash to know better, and `llmft.hub.pin` follows no branch unasked.

    Raises:
        UserError: a folder without configuration, weights or tokenizer, a path that is not there, or a hub name or revision that
            the hub does not know.
    """
    if name == "toy":
        return ModelRef(name="toy", revision=revision, fingerprint=folder_fingerprint(TOY), path=str(TOY))
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        for what, patterns in (
            ("config.json", ("config.json",)),
            ("weights", WEIGHTS),
            ("tokenizer", ("tokenizer*", "vocab.*", "*.model")),
        ):
            if not any(found for pattern in patterns for found in folder.glob(pattern)):
                raise UserError(
                    f"model: the folder {folder} holds no {what}. It must be in hub format: config.json, *.safetensors, tokenizer files."
                )
        return ModelRef(name=folder.name, revision=revision, fingerprint=folder_fingerprint(folder), path=str(folder))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model: there is no folder {folder}. Give a folder in hub format, a hub name such as facebook/opt-125m, or 'toy'.")
    commit = pin(name, revision)
    return ModelRef(name=name, revision=commit, fingerprint=f"hub:{name}@{commit}")


@lru_cache(maxsize=64)
def folder_fingerprint(folder: Path) -> str:
    """16 hexadecimal digits for a folder's contents: names, sizes, small files whole, weights from both ends."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".txt", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLE))
            if size > SAMPLE:
                file.seek(max(SAMPLE, size - SAMPLE))
                digest.update(file.read())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ModelInfo:
    """A model's configuration and tokenizer, and what prompts depend on.

    Attributes:
        config, tokenizer: of transformers; shared by the whole process, so they must not be changed.
        context_length: the longest text, in tokens, that the model's positions reach; `UNBOUNDED` where nothing bounds it.
        decoder_prefix: the token ids that the decoder of an encoder-decoder model reads before an answer; empty for causal models.
        can_share_prefix: whether the tokens that all prompts begin with can be encoded once, as keys and values.
        tuned_from: the model that this one was tuned from, where its config.json names it.
    """

    ref: ModelRef
    config: Any
    tokenizer: Any
    context_length: int
    decoder_prefix: tuple[int, ...]
    can_share_prefix: bool
    tuned_from: str | None

    @property
    def is_encoder_decoder(self) -> bool:
        return self.config.is_encoder_decoder

    @property
    def is_bounded(self) -> bool:
        """Whether the model's positions bound its context."""
        return self.context_length < UNBOUNDED

    @property
    def vocab_size(self) -> int:
        """How many tokens the output embedding scores, what pads the vocabulary included."""
        return self.config.vocab_size

    def max_length(self, asked: int | None) -> int:
        """The tokens that a prompt and its answer may take: `asked`, as far as the context reaches; None asks for all of it."""
        return min(asked or self.context_length, self.context_length)


@lru_cache(maxsize=4)
def read_model_info(ref: ModelRef) -> ModelInfo:
    """Read the configuration and the tokenizer of the model `ref`, once per process.

    Raises:
        UserError: one of them cannot be loaded, or the configuration of an encoder-decoder model names no first token of the decoder.
    """
    config, tokenizer = load_config(ref), load_tokenizer(ref)
    start_token = decoder_start_token(config, ref.name)
    return ModelInfo(
        ref=ref,
        config=config,
        tokenizer=tokenizer,
        context_length=context_length(config),
        decoder_prefix=() if start_token is None else decoder_start(tokenizer, start_token),
        can_share_prefix=shares_prefix(config),
        tuned_from=_tuned_from(ref),
    )


def context_length(config: Any) -> int:
    """Read from a configuration how long a text its positions reach, in tokens (an encoder's, where there is one).

    T5's relative positions have no bound, although its configuration may say how long the texts of its training were.
    """
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_encoder_position_embeddings")
    if not hasattr(config, "relative_attention_num_buckets"):
        for name in names:
            if isinstance(value := getattr(config, name, None), int):
                return value
    return UNBOUNDED


def _tuned_from(ref: ModelRef) -> str | None:
    """The name that transformers before version 5 wrote into the config.json of a model that was loaded, trained and saved."""
    folder = Path(ref.path or fetch_model(ref.name, ref.revision, weights=False))
    return json.loads((folder / "config.json").read_text()).get("_name_or_path")
