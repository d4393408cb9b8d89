"""Chain of thought: a model says a rationale after the query, and the label words are scored behind it.

What it says ends at the marker, such as " The answer is", that stands in every demonstration between rationale and label word, or where
an output ends anyway (the separator, the end of the text, the most tokens allowed); then the marker is put behind it. The label is
read from the logits there: no text is searched for a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmft.config import GenerationSpec, Pattern
from llmft.errors import Cause, TrialFailure, UserError
from llmft.prompting.encoding import EncodedQueries
from llmft.prompting.tokenization import encode


@dataclass(frozen=True)
class Decoding:
    """How a trial generates.

    Attributes:
        stop: texts before which an output ends.
        seed: of what is drawn at a temperature above 0.
        metric: the score of a text that comparisons are about.
    """

    spec: GenerationSpec
    tokenizer: Any
    stop: tuple[str, ...]
    seed: int
    metric: str

    def read(self, ids: Sequence[int], ends: Sequence[int]) -> tuple[str, bool]:
        """The text of generated ids, and whether it came to its end (by one of the tokens `ends` or a text of `stop`)."""
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        stopped = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        return text[: min(stopped, default=None)].strip(), bool(stopped) or end is not None


@dataclass(frozen=True)
class RationaleDecoding:
    """How a trial's rationales are generated and read.

    Attributes:
        decoding: its `stop` are the marker and what else ends a rationale.
        most: tokens of the longest prompt, rationale and marker included, behind which a label word fits.
    """

    marker: str
    pattern: Pattern
    decoding: Decoding
    most: int

    @property
    def n_new_tokens(self) -> int:
        """Places that a rationale and the marker take at the most."""
        return self.decoding.spec.max_new_tokens + len(encode(self.decoding.tokenizer, [self.marker])[0])

    def read(self, ids: Sequence[int], ends: Sequence[int]) -> tuple[str, bool]:
        """The rationale among generated ids, and whether the marker was reached.

        Args:
            ends: tokens that end a text.
        """
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        text = self.decoding.tokenizer.decode(ids[:end], skip_special_tokens=True)
        places = {stop: text.find(stop) for stop in self.decoding.stop if stop in text}
        first = min(places, key=places.__getitem__, default=None)
        return text[: places[first] if places else None].strip(), first == self.marker

    def followed(self, queries: EncodedQueries, rationales: Sequence[str], n_before: int) -> EncodedQueries:
        """The queries with their rationales and the marker behind them, where the label word follows.

        Args:
            n_before: tokens that precede all of them.

        Raises:
            TrialFailure: one takes more (QUERY_TOO_LONG).
            UserError: the tokenizer joins a rationale with the query.
        """
        tokenizer, prefix = self.decoding.tokenizer, self.pattern.label_prefix
        said = [f"{prefix}{rationale}{self.marker}" if rationale else self.marker for rationale in rationales]
        alone = encode(tokenizer, queries.texts)
        whole = encode(tokenizer, [text + more for text, more in zip(queries.texts, said, strict=True)])
        suffixes = []
        for suffix, before, ids in zip(queries.suffixes, alone, whole, strict=True):
            if ids[: len(before)] != before:
                raise UserError(
                    f"pattern: no rationale can follow the pattern {self.pattern.template!r}: this tokenizer joins it with the text "
                    "before. Choose a pattern that does not end in a space."
                )
            suffixes.append((*suffix, *ids[len(before) :]))
        if (longest := n_before + max(map(len, suffixes))) > self.most:
            raise TrialFailure(
                Cause.QUERY_TOO_LONG,
                f"a prompt with its rationale takes {longest} tokens; at most {self.most} fit this model or max_length.",
            )
        return replace(queries, suffixes=tuple(suffixes))
