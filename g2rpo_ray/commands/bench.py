"""Measures the parts of a run on this machine: `g2rpo bench --config FILE`, for `--check --calibration`."""

import argparse
from pathlib import Path

from g2rpo_ray.config import load_config
from g2rpo_ray.exits import Parser, command, path_option

MAX_MINUTES = 1440.0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(
        prog="python -m g2rpo_ray.bench",
        description="Measure on this machine what `--check --calibration bench.json` tells the hours of a run from: "
        "evaluations by batch, decoding, rewards, a learner's states; memory against the estimate; mismatch and bits.",
        epilog="example: python -m g2rpo_ray.bench --config flux_hps --random",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, or the name of a packaged file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument("--minutes", type=_minutes, default=5.0, help="that it takes, about (default: 5)")
    parser.add_argument(
        "--random", action="store_true", help="random weights of the model's shape, from its configuration files alone"
    )
    parser.add_argument(
        "--output", metavar="FILE", type=path_option, default=Path("bench.json"), help="default: bench.json"
    )
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 < minutes <= MAX_MINUTES:
        raise argparse.ArgumentTypeError(f"{text!r} given; must be minutes, more than 0 and at most {MAX_MINUTES:g}")
    return minutes


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Measure; returns the exit status: 0 done, 2 invalid input."""
    config = load_config(options.config, options.set)
    from g2rpo_ray.rehearsal import calibration
    from g2rpo_ray.rehearsal.bench import Bench
    from g2rpo_ray.rehearsal.published import with_shapes

    if not options.output.parent.is_dir():
        raise ValueError(f"--output: {options.output.parent} is no folder")
    measured = with_shapes(config) if options.random else config
    if measured is None:
        raise ValueError(
            f"--random: the shapes of {config.model.path} are not known here; give a folder with its files"
        )
    bench = Bench(measured, options.random, 60 * options.minutes, print)
    times = bench.run()
    calibration.write(options.output, config, bench.found, times)
    found = bench.found
    for kind, (taken, estimate) in found["memory_gib"].items():
        print(f"memory, {kind}: {taken:.3g} GiB, by estimate {estimate:.3g}")
    bits = ", ".join(f"{what} {'yes' if same else 'NO'}" for what, same in found["same_bits"].items())
    print(f"the same bits twice: {bits}")
    mismatch = found["mismatch_velocity"]
    print(f"mismatch of rollout and learner: {mismatch:.3g}, at most {config.velocity_tolerance:g} is allowed")
    print(
        f"share of the rate of large products, {found['matmul_tflops']:.3g}e12 a second: {found['share_of_matmul']:.0%}"
    )
    print(f"{options.output} is written: g2rpo run --check --calibration {options.output}")
    return 0
