"""Downloads the models of a configuration to the hub's cache: `python -m g2rpo_ray.fetch --config FILE`."""

import argparse
import time

from g2rpo_ray.config import load_config
from g2rpo_ray.exits import Parser, command
from g2rpo_ray.hub import all_files


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo fetch`."""
    parser = Parser(
        prog="python -m g2rpo_ray.fetch",
        description="Download the model and the rewards' models of a configuration to the Hugging Face cache "
        "(HF_HOME). A run does so before its actors start; this command needs no GPU.",
        epilog="example: python -m g2rpo_ray.fetch --config flux_hps",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, or the name of a packaged file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Downloads; returns the exit status: 0 done, 2 invalid input or a file that cannot be downloaded."""
    wanted = all_files(load_config(options.config, options.set))
    for files in wanted:
        print(f"{files.key}: {files.name}", flush=True)
        started = time.monotonic()
        place = files.fetch()
        print(f"    {place}, after {time.monotonic() - started:.0f} s", flush=True)
    print(f"{len(wanted)} fetched" if wanted else "nothing to fetch: no setting names files on the hub")
    return 0
