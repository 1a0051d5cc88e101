"""A reward server: images a second by batch size, and how long a unit's images wait for their scores under load.

python benchmarks/rewards.py                        the embedded preference model
python benchmarks/rewards.py --architecture ViT-H-14 [--device cuda --dtype float16]    HPSv2.1's size, random weights
"""

from typing import Any

import numpy as np
from common import Row, alternate, median, parser, report

import torch  # isort: skip  # common makes the packages importable
from g2rpo_ray.rewards import build_reward
from g2rpo_ray.rewards.hpsv2 import HPSv2, load_architecture, new_network


def waiting(service: float, load: float, arrivals: int = 20_000) -> tuple[float, float]:
    """Median and 99th percentile of a unit's wait [s] at one server that takes `service` s, units coming at random."""
    gaps = np.random.default_rng(0).exponential(service / load, arrivals)
    waits = [0.0]
    for gap in gaps[1:]:  # Lindley: what the one before waited and took, less the time since it came
        waits.append(max(0.0, waits[-1] + service - gap))
    return float(np.median(waits)), float(np.quantile(waits, 0.99))


def main() -> None:
    options = parser(__doc__ or "", repeats=5)
    options.add_argument("--architecture", help="an open_clip model with random weights instead of the embedded one")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32", help="of the network with random weights")
    options.add_argument(
        "--size", type=int, default=None, help="pixels along an edge; default 32, or 720 with --architecture"
    )
    options.add_argument("--images", type=int, default=36, help="of one unit")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    size = given.size or (720 if given.architecture else 32)
    reward: Any
    if given.architecture:
        shape = load_architecture(given.architecture)
        reward = HPSv2(new_network(shape), shape, given.device, getattr(torch, given.dtype))
    else:
        paths = {"checkpoint": "embedded:preference.pt", "architecture": "embedded:preference.json"}
        reward = build_reward("hpsv2", **paths, device=given.device)
    batches, repeats = ([1, 4], 1) if given.quick else (given.batches, given.repeats)
    images = np.random.default_rng(0).integers(0, 256, (max(*batches, given.images), size, size, 3), dtype=np.uint8)

    def score(count: int, batch: int) -> None:
        for at in range(0, count, batch):
            part = images[at : min(at + batch, count)]
            reward.score(part, ["a red circle"] * len(part))

    score(batches[-1], batches[-1])
    one = alternate({str(batch): (lambda batch=batch: score(batch, batch)) for batch in batches}, repeats)
    unit = alternate({str(batch): (lambda batch=batch: score(given.images, batch)) for batch in batches}, repeats)
    rows: list[Row] = []
    for batch in batches:
        service = median(unit[str(batch)])
        row: Row = {"batch": batch, "images/s": batch / median(one[str(batch)]), f"s a unit of {given.images}": service}
        for load in (0.5, 0.8, 0.95):
            middle, worst = waiting(service, load)
            row[f"wait s at {load:.0%}, median / 99 %"] = f"{middle:.3g} / {worst:.3g}"
        rows.append(row)
    notes = [
        f"{given.threads} threads, {size} px, median of {repeats}; waits follow from the measured s a unit (M/D/1)."
    ]
    report(f"Reward server, {given.architecture or 'embedded preference model'}", rows, given.json, notes)


if __name__ == "__main__":
    main()
