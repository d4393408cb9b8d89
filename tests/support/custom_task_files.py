"""Tasks of a user's own for tests, made of pairs of the toy language."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmft.config.custom_task import CustomTask, expand_format
from llmft.config.spec import DataRef, TaskRef
from llmft.data.custom import TableTask, complete
from llmft.data.task import TaskData
from llmft.tasks._toy_language import Pair, shared_words


def own_task(
    folder: Path, name: str, pairs: Iterable[Pair], pattern: str = "{premise} {hypothesis} ?", words: Sequence[str] = ("No", "Yes"),
    tests: Iterable[Pair] = (), **content: Any,
) -> dict[str, TaskRef]:  # fmt: skip
    """The task by its name; its files lie in `folder`, each row with its rationale in the column `why`.

    Tested on `tests`, or its first row."""
    pairs = list(pairs)
    for file, of in (("train", pairs), ("test", list(tests) or pairs[:1])):
        rows = [{"premise": p.premise, "hypothesis": p.hypothesis, "label": p.label, "why": shared_words(p)} for p in of]
        (folder / f"{name}_{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content |= {
        "name": name, "train": str(folder / f"{name}_train.jsonl"), "test": {"in_domain": str(folder / f"{name}_test.jsonl")},
        "patterns": {"plain": pattern}, "verbalizers": {"words": words},
    }  # fmt: skip
    definition = CustomTask.model_validate_json(json.dumps(content))
    data = TableTask(definition).resolve_data()
    return {name: TaskRef(data=data, definition=complete(definition, data))}


def labelled_task(folder: Path, **changed: Any) -> dict[str, Any]:
    """Premises and hypotheses with labels, in train.csv, test.csv and other.jsonl; None leaves a key out."""
    test = {"in_domain": f"{folder}/test.csv", "out_of_domain": {"other": f"{folder}/other.jsonl"}}
    usual = {
        "name": "mine", "train": f"{folder}/train.csv", "test": test, "columns": {"premise": "s1", "hypothesis": "s2"},
        "label": "gold", "labels": {"entailment": "yes", "not_entailment": "no"}, "groups": ["from"],
        "patterns": {"minimal": "{premise} {hypothesis} ?"}, "verbalizers": {"yes-no": ["Yes", "No"]},
    }  # fmt: skip
    return {name: value for name, value in (usual | changed).items() if value is not None}


def text_task(folder: Path, **changed: Any) -> dict[str, Any]:
    """Questions with lists of answers, in pairs.jsonl and pairs_test.parquet; None leaves a key out."""
    usual = {
        "name": "mine", "kind": "generation", "train": f"{folder}/pairs.jsonl", "test": {"in_domain": f"{folder}/pairs_test.parquet"},
        "columns": {"prompt": "question"}, "references": "answers", "metric": "token_f1", "max_new_tokens": 6,
        "patterns": {"plain": "{prompt}\nAnswer:"},
    }  # fmt: skip
    return {name: value for name, value in (usual | changed).items() if value is not None}


def parse_task(content: dict[str, Any]) -> CustomTask:
    return CustomTask.model_validate_json(json.dumps(expand_format(content)))


def load_completed(definition: CustomTask) -> tuple[TableTask, TaskData, DataRef]:
    """Complete the task and read all its rows."""
    task = TableTask(definition)
    data = task.resolve_data()
    completed = complete(definition, data)
    return TableTask(completed), TableTask(completed).load(data), data


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
