"""YAML files as DVC reads and writes them, which is YAML 1.2; PyYAML reads YAML 1.1."""

import re
from pathlib import Path
from typing import Any

import yaml

from tailcal.errors import UserError

MAX_EXPANDED = 100_000  # values that the aliases of a file may stand for


class _Loader(yaml.SafeLoader):
    """In YAML 1.1, 1e-05 is a text, `on` a bool, and 010 is 8."""

    expanded = 0

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias:
            self._expand(node)
        return node

    def _expand(self, node: yaml.Node) -> None:
        """Count the values that an alias stands for: ten lines of aliases can stand for more than any memory holds."""
        self.expanded += 1
        if self.expanded > MAX_EXPANDED:
            raise yaml.composer.ComposerError(
                None, None, f"its aliases stand for more than {MAX_EXPANDED:,} values", node.start_mark
            )
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        for child in [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]:
            self._expand(child)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in ("float", "bool", "int")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as plain values. Raises UserError (one line) naming the file."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this from the project's root") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be text in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:  # of PyYAML's constructors
        raise UserError(f"{path}: not valid YAML: {error!r}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    return raw
