"""YAML that cannot grow: what a few lines of aliases or brackets could become is refused before it is built."""

from typing import Any

import yaml

MOST_BYTES, MOST_NODES, MOST_DEPTH = 1 << 20, 10_000, 32


def read_yaml(text: str) -> Any:
    """The value in a YAML text.

    Raises:
        ValueError: it is not YAML, gives a key twice, or is too long, too deep, or too large with its aliases expanded.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES} characters")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size, _ = _measure(node, {})
        if size > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES} values, with its aliases expanded")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {MOST_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of values, as if aliases were copies, and depth. An alias inside of itself ends in RecursionError."""
    if id(node) not in known:
        parts = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
            parts = [part for pair in node.value for part in pair]
        sizes = [_measure(part, known) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if known[id(node)][1] > MOST_DEPTH:
            raise RecursionError
    return known[id(node)]


def _refuse_twice(node: yaml.MappingNode) -> None:
    known: set[str] = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in known:
            raise ValueError(f"{key.value} is given a second time in line {key.start_mark.line + 1}")
        known.add(key.value)
