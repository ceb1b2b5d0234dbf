"""YAML as OmegaConf reads it, and no more of it than files of settings need.

1e-15 is a number there, and a text in plain YAML 1.1. Names are texts and each is there once.
Aliases are followed as far as `MOST_VALUES`, since ten lines of them can stand for more values than
any memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from dsd_fast.config.reading import DEEPEST, MOST_DIGITS, integer
from dsd_fast.ranges import shown

# In a file, aliases written out; official ones have a hundred.
MOST_VALUES = 10_000

_FLOAT, _INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"


def parse(text: str) -> Any:
    """The value of a YAML text: texts, numbers, booleans, None, lists and dictionaries by texts.

    Raises:
        yaml.YAMLError: for all else, with the line.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    # A number that is no code point, in a quoted text.
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(f"line {loader.line + 1}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise yaml.YAMLError(f"{where}{error.problem or error.context}") from error
    finally:
        loader.dispose()


def _refuse(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._written_out = 0
        # id of a node -> the values that it stands for, its aliases written out.
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if self._depth >= DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"this nests deeper than {DEEPEST} levels", problem_mark=event.start_mark
            )
        is_alias = isinstance(event, yaml.AliasEvent)
        before = self._written_out
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            if id(node) not in self._sizes:
                raise yaml.MarkedYAMLError(
                    problem="this alias is a part of what it stands for",
                    problem_mark=event.start_mark,
                )
            self._written_out += self._sizes[id(node)]
        else:
            self._written_out += 1
            self._sizes[id(node)] = self._written_out - before
        if self._written_out > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"expected at most {MOST_VALUES} values, aliases written out",
                problem_mark=event.start_mark,
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # What PyYAML's constructors raise for "!!int x", "!!bool x", a date of month 13, ...
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            why = f": {error}" if isinstance(error, ValueError) else ""
            raise _refuse(node, f"cannot read {shown(node.value)} as {kind}{why}") from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):  # not of "!!map [1]"
            self._check_names(node)
        return super().construct_mapping(node, deep)

    def _check_names(self, node: yaml.MappingNode) -> None:
        names = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise _refuse(key, f"expected the name of a setting, got {shown(key.value)}")
            if key.value in names:
                raise _refuse(key, f"{shown(key.value)} is there twice")
            names.add(key.value)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Longer ones, and hours:minutes:seconds of any length, take PyYAML long.
        if len(node.value) > MOST_DIGITS:
            return integer(node.value)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        if len(node.value) > 10 * MOST_DIGITS:
            raise ValueError("expected a shorter number")
        return super().construct_yaml_float(node)


_Loader.add_constructor(_INT, _Loader.construct_yaml_int)
_Loader.add_constructor(_FLOAT, _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _FLOAT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
