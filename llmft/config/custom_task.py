"""A custom task as plain data: its files, columns, labels or references, and patterns.

It stands in a plan under `tasks` and is part of every trial's spec, so that a worker needs nothing but the files.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llmft.config.base import StrictModel
from llmft.config.patterns import Pattern

RESERVED = ("train", "dev", "shots")  # sets that every task has
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"

ExampleMetric = Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "token_f1"]
"""The scores of a single text. Those of a set are their means; BLEU has none for a single text."""
EXAMPLE_METRICS: tuple[ExampleMetric, ...] = get_args(ExampleMetric)
ROUGE = EXAMPLE_METRICS[:4]

ALPACA = {
    "kind": "generation",
    "columns": {"instruction": "instruction", "input": "input"},
    "references": "output",
    "max_new_tokens": 256,
    "patterns": {
        "alpaca": {
            "template": "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
            "\n\n### Response:",
            "without": "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\n{instruction}\n\n### Response:",
        }
    },
}
"""Taori et al. 2023, `train.py` of github.com/tatsu-lab/stanford_alpaca; there the response follows without a space."""
FORMATS: dict[str, dict[str, Any]] = {"alpaca": ALPACA}
"""Values of `format` in a plan, and the keys that each stands for."""


class HubTable(StrictModel):
    """A split of a data set on the hub, as parquet files."""

    repository: str
    configuration: str | None = Field(None, description="null: the only one that there is")
    split: str
    revision: str = Field("refs/convert/parquet", description="the hub keeps every public data set's rows there")


class Table(StrictModel):
    """Where rows lie: a file (.csv, .tsv, .txt, .json, .jsonl, .parquet), or a split on the hub."""

    file: str | None = None
    hub: HubTable | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Table:
        if (self.file is None) == (self.hub is None):
            raise ValueError("give a file, or hub: {repository, configuration, split}")
        return self

    def __str__(self) -> str:
        return f"{self.hub.repository} {self.hub.split}" if self.hub else str(self.file)


class ReportedTables(StrictModel):
    """The reported sets. The first out of domain is the headline number."""

    in_domain: Table
    out_of_domain: dict[str, Table] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"in_domain": value} if isinstance(value, str) else value


class CustomTask(StrictModel):
    """A task on the user's own tables. `llmft.data.custom.complete` fills in the fields that may be left out.

    Attributes:
        kind: an answer is a label (classification), or a text (generation).
        train: the pool of shots, and of dev examples unless `dev` holds them.
        columns: field of the patterns -> column of the files; left out: the fields are the columns.
        label: column of the gold labels.
        labels: name of each label -> its value in the files, or a list of names that are the values; left out: the values in `train`.
        rationale: column of the reasons for the labels, for chain-of-thought demonstrations; empty: none.
        groups: columns by which results are also reported.
        verbalizers: name -> one label word per label, in the order of `labels`; left out: the names of the labels. The first
            goes with every pattern that names none.
        references: for generation, column of the reference texts: one text or a list, the first of which is trained on.
        drop_empty: for generation, whether rows without a reference are left out; otherwise they are an error.
        metric: for generation, the score that comparisons use.
        max_new_tokens: for generation, most tokens of a text, unless the plan's `generation` says otherwise.
    """

    name: str = Field(pattern=NAME)
    kind: Literal["classification", "generation"] = "classification"
    description: str = ""
    train: Table
    dev: Table | None = None
    test: ReportedTables
    columns: dict[str, str] = Field(default_factory=dict)
    label: str = "label"
    labels: dict[str, str | int | float | bool] = Field(default_factory=dict)
    rationale: str = ""
    groups: tuple[str, ...] = ()
    patterns: dict[str, Pattern] = Field(min_length=1)
    verbalizers: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    references: str = ""
    drop_empty: bool = False
    metric: ExampleMetric = "rougeL"
    max_new_tokens: int = Field(64, ge=1)

    @field_validator("labels", mode="before")
    @classmethod
    def _named_by_value(cls, value: Any) -> Any:
        return {str(item): item for item in value} if isinstance(value, list | tuple) else value

    @field_validator("verbalizers", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, words in value.items():
            if isinstance(words, list) and any(isinstance(word, bool) for word in words):
                raise ValueError(f'{name}: true and false are no words in YAML; write "True" and "False" in quotes')
        return {name: tuple(words) if isinstance(words, list) else words for name, words in value.items()}

    @model_validator(mode="after")
    def _check_sets(self) -> CustomTask:
        sets = (self.name, *self.test.out_of_domain)
        for name in sets:
            if name in RESERVED or sets.count(name) > 1 or not re.match(NAME, name):
                raise ValueError(f"a test set cannot be called {name!r} here; choose another name")
        reported = (self.test.in_domain, *self.test.out_of_domain.values())
        if self.train in reported:
            raise ValueError(f"test: {self.train} is also the training pool; a score on it would say nothing")
        if self.dev in (self.train, *reported):
            other = "the training pool; leave dev out, and it is drawn from there" if self.dev == self.train else "reported"
            raise ValueError(f"dev: {self.dev} selects checkpoints and hyper-parameters, and is also {other}")
        return self

    @model_validator(mode="after")
    def _check_patterns(self) -> CustomTask:
        for name, pattern in self.patterns.items():
            if self.columns and (unknown := [field for field in pattern.fields if field not in self.columns]):
                raise ValueError(f"patterns.{name}: {{{unknown[0]}}} is no field of the task. Fields: {', '.join(self.columns)}")
            if self.generates and (pattern.verbalizer or self.labels or self.verbalizers or self.groups):
                raise ValueError("labels, verbalizers and groups are for kind: classification; remove them")
            if pattern.verbalizer and self.verbalizers and pattern.verbalizer not in self.verbalizers:
                known = ", ".join(self.verbalizers)
                raise ValueError(f"patterns.{name}: unknown verbalizer {pattern.verbalizer!r}. Verbalizers: {known}")
        return self

    @model_validator(mode="after")
    def _check_answers(self) -> CustomTask:
        if self.generates and not self.references:
            raise ValueError("references: name the column that holds the texts which a model should give")
        if self.references and not self.generates:
            raise ValueError("references is for kind: generation; set kind, or remove it")
        if len(self.labels) == 1:
            raise ValueError("labels: one label is nothing to tell apart; name at least two")
        if len({label_text(value) for value in self.labels.values()}) < len(self.labels):
            raise ValueError("labels: two labels have the same value")
        for name, words in self.verbalizers.items():
            if self.labels and len(words) != len(self.labels):
                raise ValueError(f"verbalizers.{name}: {len(words)} words for {len(self.labels)} labels")
            if len(set(words)) < len(words) or not all(words):
                raise ValueError(f"verbalizers.{name}: every label needs a word of its own")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def generates(self) -> bool:
        return self.kind == "generation"

    @property
    def optional(self) -> set[str]:
        """Fields that an example may leave empty, and for which the files may have no column."""
        optional = {field for pattern in self.patterns.values() for field in pattern.optional}
        return optional - {field for pattern in self.patterns.values() for field in pattern.fields if field not in pattern.optional}

    @property
    def tables(self) -> dict[str, Table]:
        """The table of each set, in a fixed order."""
        named = {"train": self.train, "dev": self.dev, self.name: self.test.in_domain, **self.test.out_of_domain}
        return {name: table for name, table in named.items() if table is not None}

    def content(self, pattern: str, verbalizer: str) -> dict[str, Any]:
        """Return what changes the result of a trial with this pattern and verbalizer: neither the files' paths nor unused parts."""
        used = self.patterns.get(pattern)
        own = {"references", "drop_empty", "metric"} if self.generates else {"label", "rationale", "groups"}
        return self.model_dump(mode="json", include={"kind", "columns", *own}) | {
            # in their order, by which label words belong to labels
            "labels": [[name, label_text(value)] for name, value in self.labels.items()],
            "has_dev": self.dev is not None,
            "out_of_domain": list(self.test.out_of_domain),
            "pattern": used and [used.template, used.label_prefix, *filter(None, [used.without])],
            "words": self.verbalizers.get(used.verbalizer if used and verbalizer == "default" else verbalizer),
        }


def expand_format(content: dict[str, Any]) -> dict[str, Any]:
    """Replace `format`, if a definition names one, by the keys it stands for; keys of the definition itself take precedence."""
    if "format" not in content:
        return content
    own, name = {key: value for key, value in content.items() if key != "format"}, content["format"]
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format: unknown format {name!r}. Formats: {', '.join(FORMATS)}")
    for key in ("columns", "patterns"):
        if isinstance(own.get(key), dict):
            own[key] = FORMATS[name][key] | own[key]
    return FORMATS[name] | own


def _name_or_definition(value: Any) -> Any:
    if isinstance(value, dict):  # validated here, so that an error names the definition's own keys alone
        return CustomTask.model_validate_json(json.dumps(expand_format(value)))
    if not isinstance(value, str | CustomTask):
        raise ValueError("must be the name of a task, or a mapping that describes one")
    return value


TaskEntry = Annotated[str | CustomTask, BeforeValidator(_name_or_definition)]
"""A task in a plan: the name of one that comes with llmft, or a custom task."""


def label_text(value: str | int | float | bool) -> str:
    """Normalize a label's value to one text: 1, 1.0, "1" and "1.0" are the same label, and so are true and "True"."""
    text = str(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text  # inf is no integer, and stays text


def definition_keys(where: str, content: dict[str, Any]) -> dict[str, Any]:
    """List the keys known in each section of a definition that stands at `where`, for error messages."""
    known: dict[str, Any] = {where: [*CustomTask.model_fields, "format"], f"{where}.test": ReportedTables.model_fields}
    test, patterns = content.get("test"), content.get("patterns")
    out = test.get("out_of_domain") if isinstance(test, dict) else None
    out_of_domain = (f"test.out_of_domain.{name}" for name in (out if isinstance(out, dict) else ()))
    for table in ("train", "dev", "test.in_domain", *out_of_domain):
        known |= {f"{where}.{table}": Table.model_fields, f"{where}.{table}.hub": HubTable.model_fields}
    for name in patterns if isinstance(patterns, dict) else ():
        known[f"{where}.patterns.{name}"] = Pattern.model_fields
    return known
