from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest

from llmft.config.custom_task import EXAMPLE_METRICS
from llmft.evaluation.metrics import text_metrics
from llmft.evaluation.predictions import Generated
from llmft.evaluation.text_metrics import corpus_bleu, example_scores, normalize_answer, token_f1
from llmft.records.record import SetMetrics


def scores(text: str, *references: str) -> dict[str, float]:
    return {name: float(values[0]) for name, values in example_scores([text], [references]).items()}


def test_rouge_by_hand():
    found = scores("the cat sat on the mat", "the cat lay on a mat")
    assert found["rouge1"] == pytest.approx(4 / 6)  # the, cat, on, mat of six words each
    assert found["rouge2"] == pytest.approx(1 / 5)  # "the cat"
    assert found["rougeL"] == pytest.approx(4 / 6)  # the cat .. on .. mat
    unequal = scores("police killed the gunman", "the gunman killed police today")
    precision, recall = 2 / 4, 2 / 5  # the gunman
    assert unequal["rougeL"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_words_are_stemmed():
    assert scores("dogs barking", "dog barks")["rouge1"] == 1


def test_for_rouge_lsum_each_line_is_a_sentence():
    found = scores("one two\nthree four", "three four\none two")
    assert found["rougeLsum"] == 1 and found["rougeL"] == pytest.approx(2 / 4)


def test_the_best_of_several_references_counts():
    wanted = ("nothing alike", "a cat sat", "the dog")
    each = [scores("a cat sat down", reference) for reference in wanted]
    assert scores("a cat sat down", *wanted) == pytest.approx({name: max(s[name] for s in each) for name in EXAMPLE_METRICS})


def brute_bleu(texts: list[list[str]], references: list[list[list[str]]]) -> float:
    """Papineni et al. 2002: clipped precisions of 1- to 4-grams over the corpus, brevity penalty with the nearest length."""

    def grams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in range(1, 5):
        right = possible = 0
        for words, wanted in zip(texts, references, strict=True):
            most = Counter()
            for reference in wanted:
                most |= grams(reference, n)
            right += sum((grams(words, n) & most).values())
            possible += max(0, len(words) - n + 1)
        total += math.log(right / possible) / 4
    length = sum(map(len, texts))
    nearest = sum(min((abs(len(r) - len(w)), len(r)) for r in wanted)[1] for w, wanted in zip(texts, references, strict=True))
    return min(1.0, math.exp(1 - nearest / length)) * math.exp(total)


def test_bleu_is_the_papers_over_the_whole_corpus_with_all_references():
    texts = ["the quick brown fox jumps over the dog", "it is a guide to action which ensures it"]
    references = [
        ("the quick brown fox jumped over the lazy dog", "the quick brown fox jumps over a dog"),
        (
            "it is a guide to action that ensures that it will obey",
            "it is the guiding principle which ensures it",
            "a guide to action",
        ),
    ]
    expected = brute_bleu([t.split() for t in texts], [[r.split() for r in wanted] for wanted in references])
    score, signature = corpus_bleu(texts, references)
    assert 0.2 < score < 0.9 and score == pytest.approx(expected)
    assert "tok:13a" in signature and "case:mixed" in signature and "version:" in signature
    assert corpus_bleu(texts, [wanted[:1] for wanted in references])[0] < score


@pytest.mark.parametrize(
    ("text", "kept"),
    [("The  Cat, sat!", "cat sat"), ("an apple a day", "apple day"), ("Theatre anthem", "theatre anthem"),
     ("it's", "its"), ("the", ""), ("  ", ""), ("A.B.C. U.S.", "abc us")],
)  # fmt: skip
def test_texts_are_normalised_as_in_squad(text, kept):
    assert normalize_answer(text) == kept


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [("The cat sat", "a cat", 2 * 1 * 0.5 / 1.5), ("red red blue", "red blue blue", 2 / 3), ("dog", "cat", 0.0),
     ("the", "a", 1.0), ("", "cat", 0.0), ("cat", "", 0.0), ("Paris, France.", "paris france", 1.0)],
)  # fmt: skip
def test_token_f1_by_hand(text, reference, f1):
    assert token_f1(text, reference) == pytest.approx(f1)


def test_exact_match_is_after_normalisation_and_with_any_reference():
    assert scores("The black cloak.", "a mask", "black cloak")["exact_match"] == 1
    assert scores("black cloaks", "a mask", "black cloak")["exact_match"] == 0


def test_a_set_has_the_means_and_nothing_of_classification():
    texts, references = ("a cat sat", "", "on it"), (("a cat sat", "dogs"), ("no",), ("it is on it",))
    numbers = text_metrics(Generated(texts, references, np.array([True, True, False]), "token_f1"), "out")
    by_text = example_scores(texts, references)
    for name in EXAMPLE_METRICS:
        assert getattr(numbers, name) == pytest.approx(by_text[name].mean())
    assert numbers.score == numbers.token_f1 and numbers.metric == "token_f1" and numbers.domain == "out"
    assert numbers.empty_share == pytest.approx(1 / 3) and numbers.cut_share == pytest.approx(1 / 3)
    assert math.isnan(numbers.accuracy) and math.isnan(numbers.majority_share) and numbers.label_shares == {}
    again = SetMetrics.model_validate_json(numbers.model_dump_json())
    assert again.rougeL == numbers.rougeL and math.isnan(again.mcc)


def test_nothing_asks_for_nltks_data():
    code = """
    import nltk

    def refuse(*_, **__):
        raise AssertionError("nltk's data was asked for")

    nltk.download = nltk.data.load = nltk.data.find = refuse
    from llmft.evaluation.text_metrics import corpus_bleu, example_scores
    print(example_scores(["One two. Three"], [["One. Two three"]])["rougeLsum"][0], corpus_bleu(["a b"], [["a b"]])[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
