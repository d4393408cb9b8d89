"""A text that many prompts begin with, tokenised once.

A tokenizer reads a whole text, so the tokens of a prompt are not those of its parts. Most tokenizers, however, first cut the text into
pieces from left to right (words, mostly) and then look at one piece at a time, so that what stands behind the end of a piece does not
change what stood before it. For these, and only these, the demonstrations are read once and each query with a short end of them; the
first prompt is tokenised whole, and shows that the two meet at the end of a piece. For all others every prompt is read whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

LOCAL = ("ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer")
"""Ways of cutting (of `tokenizers`) in which the end of a piece depends on at most one character behind it."""
BEHIND = 64  # characters of the opening, at least, that are read again with each query
ENDS = 4  # pieces that must end there, so that no piece of the query reaches back to the seam
READS_FAR = re.compile(r"\(\?<|\(\?[=!]|\\[bBAGzZ]|(?<!\[)\^|\$")
"""What makes a regular expression look behind, or farther ahead than the usual `(?!\\S)`."""


def encode(tokenizer, texts: Sequence[str], closed: bool = False) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own opening token; with its closing one only if `closed`, as encoders read it."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=True,
        truncation=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    if closed:
        return encoded
    sample = tokenizer("a")["input_ids"]
    if len(sample) > 1 and sample[-1] == tokenizer.eos_token_id:
        encoded = [ids[:-1] for ids in encoded]
    return encoded


def n_prefix_tokens(tokenizer) -> int:
    """How many special tokens the tokenizer puts in front of every text."""
    return tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"].index(0)


class PrefixTokenizer:
    """Tokenises prompts that begin with the same text.

    Args:
        text: what they begin with; nothing is taken apart where it is short.
        sample: what follows it in one of them.
        closed: as for `encode`.

    Attributes:
        ids: the tokens that every prompt begins with; none where the tokenizer must read each prompt whole.
    """

    def __init__(self, tokenizer, text: str, sample: str, closed: bool = False):
        self.tokenizer, self.closed = tokenizer, closed
        self.ids: list[int] = []
        self._again, self._n_special = text, 0
        seam = _seam(tokenizer, text) if cuts_from_left_to_right(tokenizer) else 0
        if not seam:
            return
        (whole,), (rest,) = (encode(tokenizer, [part + sample], closed) for part in (text, text[seam:]))
        n_special = n_prefix_tokens(tokenizer)
        rest = rest[n_special:]
        if whole[len(whole) - len(rest) :] == rest:
            self.ids, self._again, self._n_special = whole[: len(whole) - len(rest)], text[seam:], n_special

    def rests(self, queries: Sequence[str]) -> list[list[int]]:
        """For each prompt, the opening's text and one of the `queries`, the tokens behind `ids`; at least one."""
        return [ids[self._n_special :] for ids in encode(self.tokenizer, [self._again + query for query in queries], self.closed)]


def _seam(tokenizer, text: str) -> int:
    """Where in the text a piece is likely to begin, far enough from its end; 0 where there is no such place."""
    seam = text.rfind(" ", 0, max(0, len(text) - BEHIND))
    if seam <= 0:
        return 0
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text[seam:])
    return seam if len(pieces) > ENDS else 0


def cuts_from_left_to_right(tokenizer) -> bool:
    """Whether each piece of a text is found without what lies before it or far behind it, and becomes tokens by itself."""
    if not tokenizer.is_fast:
        return False
    core = tokenizer.backend_tokenizer
    if core.normalizer is not None and _parts(core.normalizer) != [{"type": "NFC"}]:  # which leaves a text that begins with a space
        return False
    if core.pre_tokenizer is None or getattr(core.model, "dropout", None):
        return False
    return all(_is_local(part) for part in _parts(core.pre_tokenizer))


def _parts(component: Any) -> list[dict[str, Any]]:
    """What a part of a tokenizer consists of, as its file would say it."""
    said = json.loads(component.__getstate__())
    return said.get("pretokenizers") or said.get("normalizers") or [said]


def _is_local(part: dict[str, Any]) -> bool:
    if part["type"] != "Split":
        return part["type"] in LOCAL
    pattern = part["pattern"]
    return part["behavior"] == "Isolated" and not READS_FAR.search(pattern.get("Regex", "").replace(r"(?!\S)", ""))
