"""Writes a report: `python -m g2rpo_ray.report RUN [RUN ...]`. A RUN is a folder or URI, running or finished."""

import argparse
from pathlib import Path

from g2rpo_ray.exits import Parser, command, path_option
from g2rpo_ray.report.page import render
from g2rpo_ray.runs.reader import read_run
from g2rpo_ray.runs.storage import Folder, replace_text

MAX_RUNS = 8  # the number of distinct colours


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo report`."""
    parser = Parser(
        prog="python -m g2rpo_ray.report",
        description="Write one self-contained HTML file about a run, or a comparison of several.",
        epilog="example: python -m g2rpo_ray.report runs/a runs/b --output compared.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, such as runs/quickstart, or its URI")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=path_option,
        help="default: report.html in the run's folder; for several runs, in the current folder",
    )
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Writes the report; returns the exit status: 0 done, 2 invalid input."""
    if len(options.runs) > MAX_RUNS:
        raise ValueError(f"RUN: {len(options.runs)} runs given; at most {MAX_RUNS} fit in one report")
    runs = [read_run(place) for place in options.runs]
    alone = Folder(options.runs[0]).path if len(runs) == 1 else None
    target = options.output or (alone or Path()) / "report.html"
    replace_text(target, render(runs))
    print(f"written: {target} ({target.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return 0
