"""Placement of actors on nodes, by arithmetic without Ray."""

from collections.abc import Mapping, Sequence

Amounts = Mapping[str, float]  # of resources, by kind


def fits(needs: Amounts, there: Amounts) -> bool:
    return all(round(there.get(kind, 0.0) - amount, 4) >= 0 for kind, amount in needs.items())


def place(demands: Sequence[tuple[int, Amounts]], nodes: Sequence[Amounts]) -> list[int]:
    """How many actors of each demand (number, resources of each) can be placed; earlier demands are placed first.

    Each actor goes to the node that has least left of what it needs (best fit). Ray may place them otherwise.
    """
    left, placed = [dict(node) for node in nodes], []
    for number, needs in demands:
        found = 0
        while found < number and (candidates := [node for node in left if fits(needs, node)]):
            node = min(candidates, key=lambda node: (sum(node[kind] for kind in needs if kind in node), len(node)))
            node.update({kind: node[kind] - amount for kind, amount in needs.items() if amount})
            found += 1
        placed.append(found)
    return placed


def largest_first(needs: Amounts, nodes: Sequence[Amounts]) -> float:
    """Sort key that places large actors first: minus the largest share of a node's resource that one needs."""
    most = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in needs}
    return -max((amount / most[kind] for kind, amount in needs.items() if most[kind]), default=0.0)
