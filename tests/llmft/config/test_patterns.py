from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmft.config.patterns import Pattern, render_prompt
from llmft.tasks._nli import NLI_PATTERNS, NLI_VERBALIZERS
from llmft.tasks._registry import TASKS, load_task

FIELDS = {"premise": "It rained.", "hypothesis": "It was wet."}


def test_the_published_patterns_word_for_word():  # Mosbach et al. 2023, Table 5
    rendered = {name: pattern.render_labelled(FIELDS, NLI_VERBALIZERS[pattern.verbalizer][0]) for name, pattern in NLI_PATTERNS.items()}
    assert rendered == {
        "minimal": "It rained. It was wet. ? Yes",
        "gpt-3": "It rained. question: It was wet. Yes or No? answer: Yes",
        "eval-harness": "It rained.\nQuestion: It was wet. True or False?\nAnswer: True",
        "eval-harness-literal": r"It rained. \nQuestion: It was wet. True or False? \nAnswer: True",  # as the shell handed it over
    }


def test_a_prompt_by_hand():
    shown = [({"premise": "a", "hypothesis": "b"}, "Yes"), ({"premise": "c", "hypothesis": "d"}, "No")]
    prompt = render_prompt(NLI_PATTERNS["minimal"], shown, {"premise": "e", "hypothesis": "f"}, "\n\n")
    assert prompt == "a b ? Yes\n\nc d ? No\n\ne f ?"
    assert render_prompt(NLI_PATTERNS["minimal"], [], {"premise": "e", "hypothesis": "f"}, "\n\n") == "e f ?"


@given(premise=st.text(max_size=30), hypothesis=st.text(max_size=30))
def test_texts_survive_whatever_they_hold(premise, hypothesis):
    rendered = NLI_PATTERNS["gpt-3"].render({"premise": premise, "hypothesis": hypothesis})
    assert rendered == premise + " question: " + hypothesis + " Yes or No? answer:"


def test_braces_in_a_text_are_no_fields():
    fields = {"premise": "{hypothesis} {0} {} {{x}}", "hypothesis": "{premise}"}
    assert NLI_PATTERNS["minimal"].render(fields) == "{hypothesis} {0} {} {{x}} {premise} ?"


def test_braces_in_a_template_that_name_nothing_stay():
    assert Pattern(template="{} {a b} {x}").render({"x": "1"}) == "{} {a b} 1"


def test_newlines_are_real():
    for task in map(load_task, TASKS):
        for name, pattern in task.patterns.items():
            assert ("\\n" in pattern.template) == name.endswith("-literal") and not ("\n" in pattern.template and "\\n" in pattern.template)
    assert NLI_PATTERNS["eval-harness"].render(FIELDS).splitlines() == [
        "It rained.",
        "Question: It was wet. True or False?",
        "Answer:",
    ]


@pytest.mark.parametrize("name", TASKS)
def test_every_pattern_of_every_task_can_be_used(name):
    task = load_task(name)
    for pattern in task.patterns.values():
        assert set(pattern.fields) == {field for _, field, _, _ in string.Formatter().parse(pattern.template) if field}
        assert not task.labels or len(task.verbalizers[pattern.verbalizer]) == len(task.labels)
