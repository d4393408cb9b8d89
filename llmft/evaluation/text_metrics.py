"""How good a generated text is, against one or several references. Scores are in [0, 1]; of several references the best counts.

ROUGE-1, -2, -L and -Lsum (Lin 2004) are rouge-score's F1, with its stemming; for ROUGE-Lsum each line of a text is a sentence.
BLEU (Papineni et al. 2002) is sacrebleu's for a whole corpus, over 100. Exact match and token F1 follow SQuAD (Rajpurkar et al.
2016, 2018): lower case, without punctuation and the articles a, an, the.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np

from llmft.config import EXAMPLE_METRICS, ROUGE


@cache
def _rouge(names: tuple[str, ...]):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(names, use_stemmer=True)  # it splits no sentences, so nltk needs no data


def normalize_answer(text: str) -> str:
    """A text as SQuAD's evaluation compares it."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def token_f1(text: str, reference: str) -> float:
    """The F1 of the words that two texts share; where one is empty, 1 if both are, else 0."""
    words, wanted = normalize_answer(text).split(), normalize_answer(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    n_shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * n_shared / (len(words) + len(wanted))


def example_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str] = EXAMPLE_METRICS
) -> dict[str, np.ndarray]:
    """The scores `names` of each text, [n] each.

    Args:
        references: those of each text, at least one.
    """
    scores = {name: np.zeros(len(texts)) for name in names}
    rouge = tuple(name for name in names if name in ROUGE)
    for place, (text, wanted) in enumerate(zip(texts, references, strict=True)):
        if rouge:
            for name, score in _rouge(rouge).score_multi(wanted, text).items():
                scores[name][place] = score.fmeasure
        if "exact_match" in names:
            scores["exact_match"][place] = normalize_answer(text) in map(normalize_answer, wanted)
        if "token_f1" in names:
            scores["token_f1"][place] = max(token_f1(text, reference) for reference in wanted)
    return scores


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """BLEU of all texts together against all references, and the signature that says how it was computed."""
    from sacrebleu.metrics import BLEU

    bleu, most = BLEU(), max(map(len, references))
    streams = [[wanted[i] if i < len(wanted) else None for wanted in references] for i in range(most)]
    return bleu.corpus_score(list(texts), streams).score / 100, str(bleu.get_signature())
