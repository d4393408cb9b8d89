from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from support.custom_task_files import labelled_task, parse_task, text_task

from llmft.config.custom_task import definition_keys, label_text
from llmft.errors import error_lines


def test_label_text():
    assert [label_text(value) for value in (1, 1.0, "1", "1.0", True, "True", "true", " a", "inf", "01")] == [
        "1", "1", "1", "1", "true", "true", "true", " a", "inf", "1"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"patterns": {"minimal": "{premise} {hypotesis} ?"}},
      "patterns.minimal: {hypotesis} is no field of the task. Fields: premise, hypothesis"),
     ({"patterns": {"minimal": "What?"}}, "patterns.minimal.template: a template must name a field"),
     ({"patterns": {}}, "patterns: "),
     ({"patterns": {"minimal": {"template": "{premise}", "verbalizer": "words"}}}, "unknown verbalizer 'words'. Verbalizers: yes-no"),
     ({"patterns": {"minimal": {"template": "{premise}", "prefix": ""}}},
      "unknown key 'patterns.minimal.prefix'. Did you mean 'label_prefix'?"),
     ({"verbalizers": {"yes-no": ["Yes"]}}, "verbalizers.yes-no: 1 words for 2 labels"),
     ({"verbalizers": {"yes-no": ["Yes", "Yes"]}}, "every label needs a word of its own"),
     ({"verbalizers": {"yes-no": [True, False]}}, 'true and false are no words in YAML; write "True" and "False" in quotes'),
     ({"labels": {"a": 1, "b": "1.0"}}, "labels: two labels have the same value"),
     ({"labels": {"a": 1}}, "labels: one label is nothing to tell apart"),
     ({"trian": "x.csv"}, "unknown key 'trian'. Did you mean 'train'?"),
     ({"train": None}, "train: is missing"),
     ({"train": {"hub": {"repository": "a/b"}}}, "train.hub.split: is missing"),
     ({"train": {}}, "train: give a file, or hub"),
     ({"test": {"in_domain": "a.csv", "out_domain": {}}}, "unknown key 'test.out_domain'. Did you mean 'out_of_domain'?"),
     ({"test": {"in_domain": "a.csv", "out_of_domain": {"dev": "b.csv"}}}, "a test set cannot be called 'dev'"),
     ({"test": {"in_domain": "a.csv", "out_of_domain": {"mine": "b.csv"}}}, "a test set cannot be called 'mine'"),
     ({"train": "a.csv", "test": {"in_domain": "a.csv"}}, "test: a.csv is also the training pool"),
     ({"dev": "a.csv", "test": {"in_domain": "a.csv"}}, "dev: a.csv selects checkpoints and hyper-parameters, and is also reported"),
     ({"dev": "a.csv", "train": "a.csv"}, "and is also the training pool; leave dev out"),
     ({"name": "train"}, "a test set cannot be called 'train'"), ({"kind": "regression"}, "kind: "), ({"name": "a/b"}, "name: ")],
)  # fmt: skip
def test_a_wrong_definition_is_one_line(changed, said):
    given = labelled_task(Path("data"), **changed)
    with pytest.raises(ValidationError) as raised:
        parse_task(given)
    known = {key.removeprefix("mine").lstrip("."): fields for key, fields in definition_keys("mine", given).items()}
    text = error_lines(raised.value, "plan.yaml", known)
    assert said in text and "\n" not in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"references": None}, "references: name the column that holds the texts"),
     ({"kind": None, "metric": None}, "references is for kind: generation"),
     ({"labels": ["a", "b"]}, "labels, verbalizers and groups are for kind: classification"),
     ({"groups": ["hint"]}, "labels, verbalizers and groups are for kind: classification"),
     ({"metric": "bleu"}, "metric: "), ({"format": "alpacca"}, "format: unknown format 'alpacca'. Formats: alpaca"),
     ({"patterns": {"a": {"template": "{prompt}", "without": "{prompt} ."}}}, "without must name some of the template's fields")],
)  # fmt: skip
def test_a_wrong_definition_of_texts_is_one_line(changed, said):
    with pytest.raises(ValueError) as raised:
        parse_task(text_task(Path("data"), **changed))
    text = error_lines(raised.value, "plan.yaml") if isinstance(raised.value, ValidationError) else str(raised.value)
    assert said in text and "\n" not in text
