"""Read YAML as people mean it: dates, yes and no stay text, 1e-3 is a number, and a key may stand once."""

from __future__ import annotations

import re
from typing import Any

import yaml

from llmft.errors import UserError
from llmft.records import StoragePath

_BOOLEAN, _TIMESTAMP = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOLEAN, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.2: YAML 1.1 also takes yes, no, on and off for booleans, and 1e-3 for text, because it has no point
_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_value(text: str) -> Any:
    """Parse one value as it would be in a file.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, _Loader)


def read_yaml(path: StoragePath) -> dict[str, Any]:
    """Read the mapping that a YAML file holds.

    Raises:
        UserError: the file is not there, not YAML, repeats a key or holds no mapping; one line with file and line.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        problem = (getattr(error, "problem", None) or str(error).splitlines()[0]).strip()
        raise UserError(f"{where}: not readable as YAML: {problem}.") from None
    if not isinstance(content, dict):
        got = "a list" if isinstance(content, list) else "nothing" if content is None else f"one value, {content!r}"
        raise UserError(
            f"{path}: holds {str(got)[:80]} in place of keys with values (key: value). A plan needs at least models, tasks and methods."
        )
    return content
