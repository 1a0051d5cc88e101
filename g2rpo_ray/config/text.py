"""A YAML reader with limits: text whose aliases or brackets expand too far is refused before it is constructed."""

import re
from typing import Any

import yaml

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 10_000, 32
INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    """Without YAML 1.1's surprises, where 010 is 8, 1:30 is 90, and a date is not text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in (INT, FLOAT, TIMESTAMP)]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node), 16 if "x" in node.value else 10)


_Loader.add_implicit_resolver(INT, re.compile(r"[-+]?([0-9]+(_[0-9]+)*|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)
_Loader.add_constructor(INT, _Loader.construct_int)


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, has a key twice, or is too long, too deep, or too large with its aliases expanded.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} characters")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a control character, or half of a surrogate pair
        raise ValueError(str(error)) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size, _ = _measure(node, {})
        if size > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values, with its aliases expanded")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of values, with aliases expanded, and depth. RecursionError for an alias inside itself."""
    if id(node) not in known:
        if isinstance(node, yaml.ScalarNode):
            _refuse_surrogate(node)
        parts = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
            parts = [part for pair in node.value for part in pair]
        sizes = [_measure(part, known) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if known[id(node)][1] > MAX_DEPTH:
            raise RecursionError
    return known[id(node)]


def _refuse_twice(node: yaml.MappingNode) -> None:
    known: set[str] = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in known:
            raise ValueError(f"{key.value} is given twice, again in line {key.start_mark.line + 1}")
        known.add(key.value)


def _refuse_surrogate(node: yaml.ScalarNode) -> None:
    """Raises ValueError for half of a surrogate pair, from an escape: it cannot be encoded."""
    try:
        node.value.encode()
    except UnicodeEncodeError:
        line = node.start_mark.line + 1
        raise ValueError(f"line {line} holds half of a surrogate pair; write the character itself") from None
