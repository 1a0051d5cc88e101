"""Measures the parts of a run on this machine: `g2rpo bench --config FILE`, for `--check --calibration`."""

import argparse
from pathlib import Path

from g2rpo_ray.config import load_config
from g2rpo_ray.exits import Parser, command, path_option

MAX_MINUTES = 1440.0


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo bench`."""
    parser = Parser(
        prog="python -m g2rpo_ray.bench",
        description="Measure on this machine the times that `--check --calibration bench.json` estimates hours from: "
        "evaluations by batch, decoding, rewards, learner states. Also memory against the estimate, mismatch and bits.",
        epilog="example: python -m g2rpo_ray.bench --config flux_hps --random",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML settings, or the name of a packaged file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument("--minutes", type=_minutes, default=5.0, help="approximate duration (default: 5)")
    parser.add_argument(
        "--random", action="store_true", help="random weights of the model's shape; needs only its configuration files"
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
    """Measures; returns the exit status: 0 done, 2 invalid input."""
    config = load_config(options.config, options.set)
    from g2rpo_ray.rehearsal import calibration
    from g2rpo_ray.rehearsal.bench import Bench
    from g2rpo_ray.rehearsal.published import with_shapes

    if not options.output.parent.is_dir():
        raise ValueError(f"--output: {options.output.parent} is not a folder")
    measured = with_shapes(config) if options.random else config
    if measured is None:
        raise ValueError(
            f"--random: the shapes of {config.model.path} are unknown; give a folder with the model's files"
        )
    bench = Bench(measured, options.random, 60 * options.minutes, print)
    times = bench.run()
    calibration.write(options.output, config, bench.found, times)
    found = bench.found
    for kind, (taken, estimate) in found["memory_gib"].items():
        print(f"memory, {kind}: {taken:.3g} GiB, by estimate {estimate:.3g}")
    bits = ", ".join(f"{part} {'yes' if same else 'NO'}" for part, same in found["same_bits"].items())
    print(f"the same bits twice: {bits}")
    mismatch = found["mismatch_velocity"]
    print(f"mismatch of rollout and learner: {mismatch:.3g}, at most {config.velocity_tolerance:g} is allowed")
    print(
        f"share of the rate of large products, {found['matmul_tflops']:.3g}e12 a second: {found['share_of_matmul']:.0%}"
    )
    print(f"written: {options.output}; use it with g2rpo run --check --calibration {options.output}")
    return 0
