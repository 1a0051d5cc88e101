"""The command `g2rpo evaluate`."""

import argparse
import logging
from collections.abc import Sequence

from g2rpo_ray.config import load_config
from g2rpo_ray.evaluation.plan import EvaluationPlan, make_plan
from g2rpo_ray.evaluation.results import write_results
from g2rpo_ray.evaluation.run import score
from g2rpo_ray.exits import Parser, command, path_option


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo evaluate`."""
    parser = Parser(
        prog="python -m g2rpo_ray.evaluate",
        description="Compare the base model and adapters: rewards, steps, seeds.",
        epilog="example: python -m g2rpo_ray.evaluate --config runs/a/config.yaml --adapter a=runs/a/lora --seeds 8",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, as of the run; default: the quickstart")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument(
        "--adapter", metavar="NAME=PATH", action="extend", nargs="+", default=[], help="LoRA to compare, file or folder"
    )
    parser.add_argument("--prompts", metavar="FILE", help="default: data.heldout_prompts")
    parser.add_argument("--steps", metavar="T", type=int, nargs="+", help="sampling steps; default: sampler.steps")
    parser.add_argument("--seeds", metavar="N", type=int, help="samples of a prompt; default: evaluation.seeds")
    parser.add_argument(
        "--hybrid", metavar="FRACTION", type=float, default=1.0, help="adapters for the first part of the steps only"
    )
    parser.add_argument("--grid", metavar="N", type=int, help="prompts in the grids; default: evaluation.grid_prompts")
    parser.add_argument(
        "--output", metavar="DIR", type=path_option, help="default: <output>/<name>/evaluation of the configuration"
    )
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else one on this machine")
    return parser


def planned(options: argparse.Namespace) -> EvaluationPlan:
    """The checked plan of the options. ValueError, in one line, if it is not possible."""
    changed = {"data.heldout_prompts": options.prompts} if options.prompts else {}
    config = load_config(options.config, options.set, **changed)
    asked = {name: getattr(options, name) for name in ("steps", "seeds", "hybrid", "grid", "output")}
    return make_plan(config, options.adapter, **asked)


@command(make_parser, stopped="stopped; scores are saved, and the same command resumes")
def _main(options: argparse.Namespace) -> int:
    plan = planned(options)
    print(write_results(plan, score(plan, options.address)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares; returns the exit status: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    from g2rpo_ray.actors.cluster import leave

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return leave(_main(arguments))
