"""Draws the tree of every method, from the plan itself, and prints what it costs: the tables of docs/methods.md.

python docs/methods.py            writes docs/methods/<method>.svg, prints the tables
python docs/methods.py --tables   prints the tables alone
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2rpo_ray.algo.tree import Shape, Tree, plan_tree
from g2rpo_ray.analysis.tables import markdown_table
from g2rpo_ray.config import Config, load_config
from g2rpo_ray.methods import method_names, preset
from g2rpo_ray.rollout.cost import prompt_cost
from g2rpo_ray.rollout.plan import possible_trees

FOLDER = Path(__file__).parent / "methods"
SHOWN, SHOWN_OFTEN = 3, 2  # most roots, and children of a branch point, that are drawn; with more than four of these
ODE, TRAINED, UNTRAINED = "#b5b5b5", "#d1495b", "#e8a5ad"
TAGS = ("#2e4057", "#4c8eb0", "#8fc1a9", "#c9c19f")


def paper(method: str) -> Config:
    """The quickstart with all of a method's own settings, its number of steps, too: only the tree is looked at."""
    given = [f"{section}.{key}={json.dumps(value)}" for section, values in preset(method).items()
             for key, value in values.items()]  # fmt: skip
    return load_config(None, [f"method={method}", *given])


def quickstart(method: str) -> Config:
    """The quickstart by a method; its own, which has fewer children and granularities, for G²RPO."""
    return load_config(None, [f"method={method}"])


def shown(config: Config) -> tuple[Shape, str]:
    """A shape small enough to draw, and what was left out."""
    sampler = config.sampler
    branch_steps = sampler.branch_steps
    if sampler.branch_schedule == "draw":
        branch_steps = (branch_steps[len(branch_steps) // 2],)
    if sampler.branch_schedule == "slide":
        branch_steps = tuple(step + 8 for step in branch_steps)
    most = SHOWN if len(branch_steps) <= 4 else SHOWN_OFTEN
    small = {"roots": min(sampler.roots, most), "group_size": min(sampler.group_size, most)}
    notes = [f"{number} of {getattr(sampler, name)} {'roots' if name == 'roots' else 'children'} drawn"
             for name, number in small.items() if number < getattr(sampler, name)]  # fmt: skip
    moves = {"draw": "the step is drawn for each prompt", "slide": "the window slides"}
    notes += [moves[sampler.branch_schedule]] if sampler.branch_schedule in moves else []
    if sampler.trained_share < 1:
        notes.append(f"{sampler.trained_share:.0%} of the stochastic steps trained, drawn for each child")
    return sampler.model_copy(update=small).shape(branch_steps, config.evaluation.anchors), "; ".join(notes)


def rows_of(tree: Tree) -> list[float]:
    """Height of each node in the picture: leaves one below the other, a parent level with its first child."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parent.tolist()):
        children.setdefault(parent, []).append(node)
    place = [0.0] * len(tree.index)
    row = 0
    stack = list(reversed(children[-1]))
    while stack:  # depth first: a node's first child shares its row
        node = stack.pop()
        first = children.get(node, [])
        if not first:
            place[node] = row
            row += 1
        stack.extend(reversed(first))
    for node in range(len(tree.index) - 1, -1, -1):
        if node in children:
            place[node] = place[children[node][0]]
    return place


def draw(method: str) -> Any:
    """The picture of a method's tree at its paper's number of steps."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "g2rpo_ray", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt
    from matplotlib.collections import LineCollection

    config = paper(method)
    shape, note = shown(config)
    tree = plan_tree(shape)
    place = rows_of(tree)
    height = 1.0 + 0.085 * (max(place) + 1)
    figure, axes = plt.subplots(figsize=(8, min(9.0, max(2.0, height))), layout="constrained")
    lines: dict[str, list[list[tuple[float, float]]]] = {ODE: [], UNTRAINED: [], TRAINED: []}
    forward = config.learner.forward  # no step is stochastic, and images are trained
    for node, parent in enumerate(tree.parent.tolist()):
        if parent >= 0:
            edge, start, end = int(tree.edge[node]), float(tree.index[parent]), float(tree.index[node])
            bend = start + 0.6 * min(1, end - start)
            way = [(start, place[parent]), (bend, place[node]), (end, place[node])]
            lines[ODE if edge < 0 or forward else TRAINED if tree.trained[edge] else UNTRAINED].append(way)
    for colour, ways in lines.items():
        axes.add_collection(LineCollection(ways, colors=colour, linewidths=0.9 if colour == ODE else 1.6))
    inner = [node for node in range(len(tree.index)) if tree.inner[node]]
    axes.scatter(tree.index[inner], [place[n] for n in inner], s=5, color="#333333", zorder=3, linewidths=0)
    for tag in sorted(set(tree.tag.tolist())):
        nodes = tree.leaf[tree.tag == tag]
        axes.scatter(tree.index[nodes], [place[n] for n in nodes], s=14, marker="s", zorder=4,
                     edgecolors=TRAINED if forward else "#333333", linewidths=1.6 if forward else 0.5,
                     color=TAGS[tag] if tag >= 0 else "#ffffff")  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xticks(range(0, shape.steps + 1, 2 if shape.steps > 12 else 1))
    axes.set_xlabel("schedule index: 0 is noise, the last is the image")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{method}" + (f" ({note})" if note else ""), fontsize=9, loc="left")
    figure.legend(handles=_legend(shape, forward), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def _legend(shape: Shape, forward: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    if forward:
        marks = {"color": TAGS[0], "markeredgecolor": TRAINED, "markeredgewidth": 1.6, "markersize": 5}
        image = Line2D([], [], marker="s", linestyle="", label="image, trained where it is noisy again", **marks)
        return [Line2D([], [], color=ODE, label="ODE"), image]
    lines = [("ODE", ODE), ("stochastic, trained", TRAINED)]
    lines += [("stochastic, not trained", UNTRAINED)] if shape.untrained else []
    handles = [Line2D([], [], color=colour, label=label) for label, colour in lines]
    handles += [
        Line2D([], [], marker="s", linestyle="", color=TAGS[tag], label=f"image, λ = {stride}", markersize=5)
        for tag, stride in enumerate(shape.strides)
    ]
    if shape.anchors:
        handles.append(Line2D([], [], marker="s", linestyle="", color="white", markeredgecolor="#333333",
                              label="anchor's image", markersize=5))  # fmt: skip
    return handles


def cost_table(title: str, configs: Sequence[Config]) -> str:
    head = (title, "T", "evaluations", "images", "learner states", "cost, with the update", "learner's share")
    rows = []
    for config in configs:
        mean = prompt_cost(config, possible_trees(config))
        cost = mean.evaluations + mean.update
        counts = (f"{count:,.0f}" for count in (mean.evaluations, mean.images, mean.states, cost))
        rows.append((f"`{config.method}`", config.sampler.steps, *counts, f"{mean.update / cost:.0%}"))
    return markdown_table(head, rows)


def setting_table() -> str:
    head = ("method", "roots", "branch steps", "children", "stochastic edges", "kernel, η", "Λ", "group, spread",
            "objective", "updates a rollout")  # fmt: skip
    rows = []
    for method in method_names():
        config = paper(method)
        s, learner = config.sampler, config.learner
        moves = {"fixed": "", "slide": ", sliding", "draw": ", one drawn"}[s.branch_schedule]
        length = f" of {s.edge_length} steps" if s.edge_length > 1 else ""
        splits = f", splits {{{_numbers(s.splits)}}}" if s.splits else ""
        weight = f", weight {learner.edge_weight:g} std" if learner.edge_weight else ""
        ways = f", subpaths {{{_numbers(learner.subpaths)}}}" if learner.subpaths else ""
        clip = "" if learner.objective in ("reinforce", "nft") else f" {learner.clip_range:g}"
        clip += f", {learner.draws} draws" if learner.forward else ""
        updates = len(s.branch_steps) if learner.schedule == "per_step" else learner.updates_per_rollout
        ode = s.kernel == "ode"
        rows.append((
            f"`{method}`", s.roots, f"{{{_numbers(s.branch_steps)}}} of {s.steps}{moves}", s.group_size,
            0 if ode else f"{s.stochastic_edges}{length}{splits}", "ode" if ode else f"{s.kernel} {s.eta:g}",
            f"{{{_numbers(s.strides)}}}", f"{config.credit.group}, {config.credit.spread}",
            f"{learner.objective}{clip}{weight}{ways}", updates,
        ))  # fmt: skip
    return markdown_table(head, rows)


def _numbers(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))


def tables() -> str:
    methods = method_names()
    parts = [
        setting_table(),
        cost_table("a prompt at the paper's setting", [paper(method) for method in methods]),
        cost_table("a prompt of the quickstart", [quickstart(method) for method in methods]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tables", action="store_true", help="print the tables alone")
    options.add_argument("--output", type=Path, default=FOLDER, help="folder of the pictures")
    given = options.parse_args()
    if not given.tables:
        given.output.mkdir(exist_ok=True)
        for method in method_names():
            draw(method).savefig(given.output / f"{method}.svg", metadata={"Date": None})
    print(tables())


if __name__ == "__main__":
    main()
