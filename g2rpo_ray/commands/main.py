"""`g2rpo COMMAND …`, the same as `python -m g2rpo_ray.COMMAND …`; and shell completion."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from g2rpo_ray.exits import Parser, command, load, loading

COMMANDS = {
    "run": ("g2rpo_ray.commands.train", "train: the quickstart, or what --config says"),
    "rehearse": ("g2rpo_ray.commands.rehearse", "check a configuration, and run it on a tiny twin of its model"),
    "fetch": ("g2rpo_ray.commands.fetch", "download the models that --config names, before a run needs them"),
    "bench": ("g2rpo_ray.commands.bench", "measure the parts of a run on this machine, for run --check --calibration"),
    "evaluate": ("g2rpo_ray.commands.evaluate", "compare the base and adapters by every reward"),
    "study": ("g2rpo_ray.commands.study", "compare methods at equal cost, by tables with intervals"),
    "verify": ("g2rpo_ray.commands.verify", "replay an iteration of a run, and say whether it comes out the same"),
    "scale": ("g2rpo_ray.commands.scale", "change the number of actors of a run that is going on"),
    "rewards": ("g2rpo_ray.commands.rewards", "try every reward of a configuration on pictures"),
    "report": ("g2rpo_ray.commands.report", "write an HTML file about a run, or several"),
    "demo": ("g2rpo_ray.commands.demo", "try adapters in the browser"),
}
EXAMPLES = """examples:
  g2rpo run                                     train the quickstart on this machine
  g2rpo run --config flux_hps --check           what a packaged configuration needs; starts nothing
  g2rpo report runs/quickstart                  runs/quickstart/report.html
  g2rpo completion bash > ~/.local/share/bash-completion/completions/g2rpo
"""


def make_parser() -> argparse.ArgumentParser:
    """The whole command line, every command's options included."""
    parser = Parser(
        prog="g2rpo",
        description="Reinforcement learning on sampling trees for text-to-image flow models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, what) in COMMANDS.items():
        with loading():
            parent = importlib.import_module(module).make_parser()
        commands.add_parser(name, parents=[parent], add_help=False, help=what)
    completion = commands.add_parser("completion", help="print the completion script of a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


@command(make_parser)
def _complete(options: argparse.Namespace) -> int:
    """Print the completion script; --help ends in the parser."""
    import shtab

    print(shtab.complete(make_parser(), options.shell))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a reward or method in a file here is found
    if given and given[0] in COMMANDS:
        module, _ = COMMANDS[given[0]]
        return load(module)(given[1:])
    return _complete(given)


if __name__ == "__main__":
    sys.exit(main())
