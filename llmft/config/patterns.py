"""From an example to text: patterns, demonstrations and whole prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Pattern:
    """A template such as `"{premise} {hypothesis} ?"`.

    The text ends where the label word begins; `label_prefix` stands between the two and belongs to the word, since " Yes" and
    "Yes" are different tokens. `verbalizer` names the label words that go with the pattern unless a plan says otherwise.
    `without` is the template, if there is one, for an example of which a field that only `template` names is empty.
    """

    template: str
    label_prefix: str = " "
    verbalizer: str = "yes-no"
    without: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(FIELD.findall(self.template))

    def render(self, fields: Mapping[str, str]) -> str:
        """The text of a query. Braces inside a field are left alone."""
        template = self.without if self.without and not all(fields[name] for name in self.fields) else self.template
        return FIELD.sub(lambda match: fields[match.group(1)], template)

    def render_labelled(self, fields: Mapping[str, str], word: str) -> str:
        """The text of a demonstration: the query and its label word."""
        return self.render(fields) + self.label_prefix + word


def render_prefix(pattern: Pattern, demonstrations: Sequence[tuple[Mapping[str, str], str]], separator: str, instruction: str = "") -> str:
    """What stands in front of a query: the instruction, if there is one, and demonstrations (fields, label word), each and a `separator`."""
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
    """The opening and the query."""
    return render_prefix(pattern, demonstrations, separator, instruction) + pattern.render(query)


def with_literals(patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The patterns and, under NAME-literal, those with newlines as the shell handed them to the code of Mosbach et al. 2023.

    There a newline arrived as the two characters backslash and n, after a space. So did the newlines of the separator: a plan that
    replicates the paper's contexts also says `separator: '\\n\\n'`.
    """
    literal = {
        f"{name}-literal": replace(pattern, template=pattern.template.replace("\n", " \\n"))
        for name, pattern in patterns.items()
        if "\n" in pattern.template
    }
    return {**patterns, **literal}
