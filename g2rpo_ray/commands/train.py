"""The command `g2rpo run`."""

import argparse
import logging
from collections.abc import Sequence

from g2rpo_ray.commands.check import check
from g2rpo_ray.commands.next_steps import next_steps
from g2rpo_ray.config import load_config
from g2rpo_ray.exits import Parser, command, path_option
from g2rpo_ray.preflight import check_writable
from g2rpo_ray.rehearsal.calibration import read
from g2rpo_ray.rehearsal.devices import fleet
from g2rpo_ray.training import prepared, run_to_end

MAX_WAIT_S = 86_400


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo run`."""
    parser = Parser(
        prog="python -m g2rpo_ray.run",
        description="Align a text-to-image flow model by reinforcement learning on sampling trees, on Ray.",
        epilog="examples:\n"
        "  python -m g2rpo_ray.run                                       the quickstart, under 3 minutes on two cores\n"
        "  python -m g2rpo_ray.run --set method=mix_grpo --name mix      with another method\n"
        "  python -m g2rpo_ray.run --config flux_hps --check             check a packaged configuration\n"
        "  python -m g2rpo_ray.run --config my.yaml --set output=s3://bucket/runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, or the name of a packaged file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument("--name", help="name of the run, its folder below `output`")
    parser.add_argument(
        "--resume", metavar="auto|never|PATH", default="auto",
        help="auto (default): resume from the run's latest checkpoint, if any; never: start from the beginning; PATH: "
        "start a new run from this checkpoint of another run",
    )  # fmt: skip
    parser.add_argument("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else one on this machine")
    parser.add_argument(
        "--wait", metavar="SECONDS", type=_seconds, default=0.0,
        help="maximum wait for another process that writes the run (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--check", nargs="?", const="all", choices=["all", "settings"],
        help="check settings, files, rewards and resources, and print the plan; `settings`: only the first two",
    )  # fmt: skip
    parser.add_argument(
        "--devices", metavar="KIND:NUMBER[@PRICE]", type=fleet,
        help="with --check: print hours, device-hours and cost on these devices, such as h100:8@2.50",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", metavar="FILE", type=path_option,
        help="with --check: use the measurements of `g2rpo bench` instead of the table of devices",
    )  # fmt: skip
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text!r} given; must be seconds from 0 to {MAX_WAIT_S}")
    return seconds


@command(make_parser)
def _main(options: argparse.Namespace) -> int:
    name = [] if options.name is None else [f"name={options.name}"]
    if options.devices and options.check != "all":
        raise ValueError("--devices: given without --check; add --check to estimate hours")
    if options.calibration and options.check != "all":
        raise ValueError("--calibration: given without --check; add --check to estimate hours")
    config = load_config(options.config, [*options.set, *name])
    if options.check:
        with prepared(config, options.resume, read_only=True) as start:
            check_writable(start.config, start.run)
            if options.check == "settings":
                print("\n".join(["settings:      ok", *(f"not checked:   {line}" for line in start.unchecked)]))
            else:
                times = read(options.calibration, config) if options.calibration else None
                check(start.config, start.prompts, start.unchecked, options.address, options.devices, times)
        return 0
    run, done = run_to_end(config, resume=options.resume, address=options.address, wait_s=options.wait)
    print(next_steps(config, run, done))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    from g2rpo_ray.actors.cluster import leave

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return leave(_main(arguments))
