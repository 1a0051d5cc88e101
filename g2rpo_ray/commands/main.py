"""`g2rpo COMMAND …`, equal to `python -m g2rpo_ray.COMMAND …`, and shell completion."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from g2rpo_ray.exits import Parser, command, load, loading

COMMANDS = {
    "run": ("g2rpo_ray.commands.train", "train the quickstart, or the configuration of --config"),
    "rehearse": ("g2rpo_ray.commands.rehearse", "check a configuration, and run it with a tiny twin of its model"),
    "fetch": ("g2rpo_ray.commands.fetch", "download the models of a configuration"),
    "bench": ("g2rpo_ray.commands.bench", "measure the parts of a run on this machine, for run --check --calibration"),
    "evaluate": ("g2rpo_ray.commands.evaluate", "compare the base and adapters by every reward"),
    "study": ("g2rpo_ray.commands.study", "compare methods at equal cost, in tables with intervals"),
    "verify": ("g2rpo_ray.commands.verify", "replay an iteration of a run, and compare it bit for bit"),
    "scale": ("g2rpo_ray.commands.scale", "change the number of actors of a running run"),
    "rewards": ("g2rpo_ray.commands.rewards", "try every reward of a configuration on images"),
    "report": ("g2rpo_ray.commands.report", "write an HTML file about one or several runs"),
    "demo": ("g2rpo_ray.commands.demo", "try adapters in the browser"),
}
EXAMPLES = """examples:
  g2rpo run                                     train the quickstart on this machine
  g2rpo run --config flux_hps --check           check a packaged configuration; starts nothing
  g2rpo report runs/quickstart                  write runs/quickstart/report.html
  g2rpo completion bash > ~/.local/share/bash-completion/completions/g2rpo
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands, with their options."""
    parser = Parser(
        prog="g2rpo",
        description="Reinforcement learning on sampling trees for text-to-image flow models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        with loading():
            parent = importlib.import_module(module).make_parser()
        commands.add_parser(name, parents=[parent], add_help=False, help=summary)
    completion = commands.add_parser("completion", help="print the completion script of a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


@command(make_parser)
def _complete(options: argparse.Namespace) -> int:
    """Prints the completion script; the parser handles --help."""
    import shtab

    print(shtab.complete(make_parser(), options.shell))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command of the first argument; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that rewards and methods in this folder are found
    if given and given[0] in COMMANDS:
        module, _ = COMMANDS[given[0]]
        return load(module)(given[1:])
    return _complete(given)


if __name__ == "__main__":
    sys.exit(main())
