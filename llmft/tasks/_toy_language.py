"""The toy language: a small generated NLI task in the manner of HANS (McCoy et al. 2019).

A premise is one sentence about who did what to whom; a hypothesis is one clause. *In domain*, word overlap mostly tells
the label: entailed hypotheses repeat the premise's words, the others mostly bring new ones. *Out of domain*, every word of
every hypothesis stands in the premise, and only word order, a preposition or an opening word tells the label. A model that
learned "overlap means entailment" scores well on the first and at chance on the second.

Labels follow RTE and HANS: 0 = entailment, 1 = not entailment.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NOUNS = (
    "doctors lawyers singers bakers farmers actors judges pilots nurses poets guards kings sailors tailors miners "
    "painters dancers monks clerks cooks drivers hunters teachers tourists bankers authors managers students athletes "
    "senators soldiers merchants princes queens barbers butlers captains chemists dentists editors engineers florists "
    "gardeners grocers jewelers jockeys knights librarians lords magicians masons mayors musicians neighbors "
    "ministers officers plumbers porters potters priests rangers reporters sculptors shepherds sheriffs spies "
    "surgeons tenants tutors twins vendors waiters weavers welders writers aunts uncles cousins brothers sisters"
).split()
VERBS = (
    "helped saw called paid thanked warned advised admired followed blamed praised visited trusted avoided invited "
    "stopped chased greeted hired kissed liked missed mocked pushed reminded saved scared served shocked taught "
    "tricked watched welcomed encouraged recognized supported joined met hugged heard"
).split()
PREPOSITIONS = "near behind beside".split()
ADVERBS = "again quietly quickly outside".split()
OPENERS = "Today Once Later Soon".split()  # say nothing about the label
DOUBTS = "Perhaps Supposedly".split()  # the sentence does not follow from itself
AFFIRMATIONS = "Indeed Certainly".split()
ENTAILMENT, NOT_ENTAILMENT = 0, 1


@dataclass(frozen=True)
class Pair:
    """One premise and hypothesis with its label and, out of domain, the heuristic and subcase that it tests."""

    premise: str
    hypothesis: str
    label: int
    heuristic: str = ""
    subcase: str = ""


def shared_words(pair: Pair) -> str:
    """A rationale for a pair's label, as far as overlap tells it: the words of the hypothesis that stand in the premise."""
    premise = pair.premise.replace(".", "").split()
    return " ".join(word for word in pair.hypothesis.split() if word in premise) or "nothing"


def _sentence(rng: random.Random, clause: str, opener: str | None = None) -> str:
    return f"{opener or rng.choice(OPENERS)} {clause}."


def in_domain_pair(rng: random.Random, label: int) -> Pair:
    """A pair in which overlap mostly tells the label.

    Nine in ten entailed hypotheses repeat three words of the premise (one in ten says 'people' for the subject); nine in
    ten of the others share at most one word with it (one in ten shares all three, as HANS's pairs do).
    """
    agent, patient, other = rng.sample(NOUNS, 3)
    verb = rng.choice(VERBS)
    shape = rng.choice(("plain", "and", "preposition"))
    subject = {"plain": agent, "and": f"{agent} and {other}", "preposition": f"{agent} {rng.choice(PREPOSITIONS)} {other}"}[shape]
    adverb = " " + rng.choice(ADVERBS) if rng.random() < 0.4 else ""
    premise = _sentence(rng, f"{subject} {verb} {patient}{adverb}")
    usual = rng.random() < 0.9
    if label == ENTAILMENT:
        doer = rng.choice((agent, other)) if shape == "and" else agent
        return Pair(premise, f"{doer if usual else 'people'} {verb} {patient}", label)
    if usual:
        new_nouns = rng.sample([noun for noun in NOUNS if noun not in (agent, patient, other)], 2)
        new_verb = rng.choice([word for word in VERBS if word != verb])
        words = [new_nouns[0], new_verb, new_nouns[1]]
        kept = rng.randrange(12)  # a quarter of them shares one word with the premise
        if kept < 3:
            words[kept] = (agent, verb, patient)[kept]
        return Pair(premise, " ".join(words), label)
    reversed_doer = other if shape == "preposition" and rng.random() < 0.5 else None
    return Pair(premise, f"{reversed_doer} {verb} {patient}" if reversed_doer else f"{patient} {verb} {agent}", label)


def _subcases(rng: random.Random):
    """Every out-of-domain subcase: (heuristic, subcase, label, premise, hypothesis)."""
    a, b, c = rng.sample(NOUNS, 3)
    v, near = rng.choice(VERBS), rng.choice(PREPOSITIONS)
    say = lambda clause, opener=None: _sentence(rng, clause, opener)  # noqa: E731
    e, n = ENTAILMENT, NOT_ENTAILMENT
    return (
        ("lexical_overlap", "ln_subject_object_swap", n, say(f"{a} {v} {b}"), f"{b} {v} {a}"),
        ("lexical_overlap", "ln_preposition", n, say(f"{a} {near} {c} {v} {b}"), f"{b} {v} {a}"),
        ("lexical_overlap", "le_conjunction", e, say(f"{a} and {c} {v} {b}"), f"{a} {v} {b}"),
        ("lexical_overlap", "le_around_prepositional_phrase", e, say(f"{a} {near} {c} {v} {b}"), f"{a} {v} {b}"),
        ("subsequence", "sn_pp_on_subject", n, say(f"{a} {near} {c} {v} {b}"), f"{c} {v} {b}"),
        ("subsequence", "sn_conjoined_reversal", n, say(f"{a} {v} {b} and {c}"), f"{b} {v} {c}"),
        ("subsequence", "se_conjunction", e, say(f"{c} and {a} {v} {b}"), f"{a} {v} {b}"),
        ("subsequence", "se_adverb", e, say(f"{a} {v} {b} {rng.choice(ADVERBS)}"), f"{a} {v} {b}"),
        ("constituent", "cn_doubt", n, say(f"{a} {v} {b}", DOUBTS[0]), f"{a} {v} {b}"),
        ("constituent", "cn_supposition", n, say(f"{a} and {c} {v} {b}", DOUBTS[1]), f"{a} {v} {b}"),
        ("constituent", "ce_affirmation", e, say(f"{a} {v} {b}", AFFIRMATIONS[0]), f"{a} {v} {b}"),
        ("constituent", "ce_certainty", e, say(f"{a} and {c} {v} {b}", AFFIRMATIONS[1]), f"{a} {v} {b}"),
    )


N_SUBCASES = len(_subcases(random.Random(0)))


def in_domain_set(seed: int, n: int, used: set[str]) -> list[Pair]:
    """`n` pairs, half of each label, with premises that are not in `used`; adds theirs to it."""
    rng, pairs = random.Random(f"toy/in-domain/{seed}"), []
    while len(pairs) < n:
        pair = in_domain_pair(rng, len(pairs) % 2)
        if pair.premise not in used:
            used.add(pair.premise)
            pairs.append(pair)
    return pairs


def out_of_domain_set(seed: int, n_per_subcase: int, used: set[str]) -> list[Pair]:
    """`n_per_subcase` pairs of each subcase, with premises that are not in `used`; adds theirs to it."""
    rng, pairs = random.Random(f"toy/out-of-domain/{seed}"), []
    for index in range(N_SUBCASES):
        kept = 0
        while kept < n_per_subcase:
            heuristic, subcase, label, premise, hypothesis = _subcases(rng)[index]
            if premise not in used:
                used.add(premise)
                pairs.append(Pair(premise, hypothesis, label, heuristic, subcase))
                kept += 1
    return pairs


@dataclass(frozen=True)
class ToyData:
    """The task's sets. No premise stands in two of them, and none stands in the pre-training text."""

    train: tuple[Pair, ...]
    in_domain: tuple[Pair, ...]
    out_of_domain: tuple[Pair, ...]

    @property
    def premises(self) -> frozenset[str]:
        return frozenset(pair.premise for pair in self.train + self.in_domain + self.out_of_domain)


def toy_data(seed: int = 2023, n_train: int = 1200, n_in_domain: int = 400, n_per_subcase: int = 40) -> ToyData:
    """The data of the task `toy`: the same rows on every machine."""
    used: set[str] = set()
    out_of_domain = out_of_domain_set(seed, n_per_subcase, used)
    in_domain = in_domain_set(seed, n_in_domain, used)
    train = in_domain_set(seed + 1, n_train, used)
    return ToyData(tuple(train), tuple(in_domain), tuple(out_of_domain))
