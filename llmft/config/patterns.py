"""Patterns: from an example's fields to the text of a query, a demonstration or a whole prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from llmft.config.base import StrictModel

FIELD = re.compile(r"\{(\w+)\}")


class Pattern(StrictModel):
    """A template such as `"{premise} {hypothesis} ?"`; in a plan it may be written as the template alone.

    The text ends where the label word or reference begins; `label_prefix` stands between the two and belongs to the word, since
    " Yes" and "Yes" are different tokens.
    """

    template: str
    label_prefix: str = " "
    verbalizer: str = Field("", description="the label words that go with it unless a plan says otherwise; empty: the task's first")
    without: str = Field("", description="the template for examples in which a field that only `template` names is empty")

    @model_validator(mode="before")
    @classmethod
    def _of_template(cls, value: Any) -> Any:
        return {"template": value} if isinstance(value, str) else value

    @field_validator("template")
    @classmethod
    def _names_a_field(cls, value: str) -> str:
        if not FIELD.findall(value):
            raise ValueError("a template must name a field, as in '{premise} {hypothesis} ?'")
        return value

    @model_validator(mode="after")
    def _names_fewer(self) -> Pattern:
        if self.without and not set(FIELD.findall(self.without)) < set(self.fields):
            raise ValueError("without must name some of the template's fields, and not all of them")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(FIELD.findall(self.template))

    @property
    def optional(self) -> set[str]:
        """Fields that an example may leave empty."""
        return set(self.fields) - set(FIELD.findall(self.without)) if self.without else set()

    def render(self, fields: Mapping[str, str]) -> str:
        """Render the text of a query. Braces inside a field are left alone."""
        template = self.without if self.without and not all(fields[name] for name in self.fields) else self.template
        return FIELD.sub(lambda match: fields[match.group(1)], template)

    def render_labelled(self, fields: Mapping[str, str], word: str) -> str:
        """Render the text of a demonstration: the query and its label word."""
        return self.render(fields) + self.label_prefix + word


def render_prefix(pattern: Pattern, demonstrations: Sequence[tuple[Mapping[str, str], str]], separator: str, instruction: str = "") -> str:
    """Render what precedes a query: the instruction, if any, and the demonstrations (fields, label word), each with a `separator`."""
    parts = [instruction] if instruction else []
    parts += [pattern.render_labelled(fields, word) for fields, word in demonstrations]
    return "".join(part + separator for part in parts)


def render_prompt(
    pattern: Pattern,
    demonstrations: Sequence[tuple[Mapping[str, str], str]],
    query: Mapping[str, str],
    separator: str,
    instruction: str = "",
) -> str:
    """Render a whole prompt: the prefix and the query."""
    return render_prefix(pattern, demonstrations, separator, instruction) + pattern.render(query)


def with_literals(patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """Add, under NAME-literal, the patterns with newlines as the shell handed them to the code of Mosbach et al. 2023.

    There a newline arrived as the two characters backslash and n, after a space. So did the newlines of the separator: a plan that
    replicates the paper's contexts also says `separator: '\\n\\n'`.
    """
    literal = {
        f"{name}-literal": pattern.model_copy(update={"template": pattern.template.replace("\n", " \\n")})
        for name, pattern in patterns.items()
        if "\n" in pattern.template
    }
    return {**patterns, **literal}
