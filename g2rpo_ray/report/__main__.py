"""Writes a report: `python -m g2rpo_ray.report RUN [RUN ...]`, runs being folders or URIs, going on or ended."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from g2rpo_ray.record.storage import replace_text
from g2rpo_ray.report import read_run, render

MOST_RUNS = 8  # as many as there are colours to tell them apart


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m g2rpo_ray.report",
        description="Write one self-contained HTML file about a run, or several compared.",
        epilog="example: python -m g2rpo_ray.report runs/a runs/b --output compared.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, such as runs/quickstart, or its URI")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the run's folder, or, of several, here"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 invalid input."""
    options = make_parser().parse_args(arguments)
    try:
        if len(options.runs) > MOST_RUNS:
            raise ValueError(f"{len(options.runs)} runs given; at most {MOST_RUNS} fit in one report")
        runs = [read_run(place) for place in options.runs]
        alone = Path(options.runs[0]) if len(runs) == 1 else Path()
        target = Path(options.output or (alone if alone.is_dir() else Path()) / "report.html")
        replace_text(target, render(runs))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {target} ({target.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
