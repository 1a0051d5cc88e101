"""`g2rpo COMMAND …`, the same as `python -m g2rpo_ray.COMMAND …`; and shell completion."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": ("g2rpo_ray.run", "train: the quickstart, or what --config says"),
    "evaluate": ("g2rpo_ray.evaluate", "compare the base and adapters by every reward"),
    "study": ("g2rpo_ray.study.__main__", "compare methods at equal cost, by tables with intervals"),
    "scale": ("g2rpo_ray.scale", "change the number of actors of a run that is going on"),
    "rewards": ("g2rpo_ray.rewards.check", "try every reward of a configuration on pictures"),
    "report": ("g2rpo_ray.report.__main__", "write an HTML file about a run, or several"),
    "demo": ("g2rpo_ray.demo", "try adapters in the browser"),
}
EXAMPLES = """examples:
  g2rpo run                                     train the quickstart on this machine
  g2rpo run --config flux_hps --check           what a packaged configuration needs; starts nothing
  g2rpo report runs/quickstart                  runs/quickstart/report.html
  g2rpo completion bash > ~/.local/share/bash-completion/completions/g2rpo
"""


def make_parser() -> argparse.ArgumentParser:
    """The whole command line, every command's options included."""
    parser = argparse.ArgumentParser(
        prog="g2rpo",
        description="Reinforcement learning on sampling trees for text-to-image flow models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, what) in COMMANDS.items():
        parent = importlib.import_module(module).make_parser()
        commands.add_parser(name, parents=[parent], add_help=False, help=what)
    completion = commands.add_parser("completion", help="print the completion script of a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the command's exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        module, _ = COMMANDS[given[0]]
        status: int = importlib.import_module(module).main(given[1:])
        return status
    parser = make_parser()
    options = parser.parse_args(given)
    import shtab

    print(shtab.complete(parser, options.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
