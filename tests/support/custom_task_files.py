"""Tasks of a user's own for tests, made of pairs of the toy language."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmft.config.custom_task import CustomTask
from llmft.config.spec import TaskRef
from llmft.data.custom import TableTask, complete
from llmft.tasks._toy_language import Pair, shared_words


def own_task(
    folder: Path, name: str, pairs: Iterable[Pair], pattern: str = "{premise} {hypothesis} ?", words: Sequence[str] = ("No", "Yes"),
    tests: Iterable[Pair] = (), **content: Any,
) -> dict[str, TaskRef]:  # fmt: skip
    """The task by its name; its files lie in `folder`, each row with its rationale in the column `why`. Tested on `tests`, or its first row."""
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
