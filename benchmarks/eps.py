"""What learner.eps changes: the trained LoRA under several values against that under the first one. No Ray.

tests/isolated python benchmarks/eps.py                                            the quickstart
tests/isolated python benchmarks/eps.py --random 8 256 --set model.dtype=bfloat16  a random FLUX of 8 + 8 blocks
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, parser, report

import torch  # isort: skip  # common makes the packages importable

from g2rpo_ray.config import load_config
from g2rpo_ray.paths import resolve

State = Mapping[str, np.ndarray]


def random_pipeline(blocks: int, width: int, folder: str) -> str:
    """The embedded pipeline with a random transformer of so many blocks of either kind; its folder."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    pipeline = FluxPipeline.from_pretrained(resolve("embedded:pipeline"))
    axes, torch_seed = pipeline.transformer.config.axes_dims_rope, torch.Generator().manual_seed(0)
    shape = {"num_layers": blocks, "num_single_layers": blocks, "num_attention_heads": width // sum(axes)}
    transformer: Any = FluxTransformer2DModel.from_config(dict(pipeline.transformer.config) | shape)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=torch_seed)
    pipeline.transformer = transformer
    pipeline.save_pretrained(folder)
    return folder


def run(settings: Sequence[str], eps: float, looks: Sequence[int]) -> tuple[State, list[tuple[float, State]]]:
    """The LoRA at the start, and (learner/eps_share, LoRA) after so many iterations each."""
    from g2rpo_ray.local import LocalRun

    config = load_config(None, [*settings, f"learner.eps={eps}", f"iterations={looks[-1]}"])
    single, found = LocalRun(config), []
    start = single.engine.lora_state()
    for iteration in range(looks[-1]):
        metrics = single.step(iteration)
        if iteration + 1 in looks:
            found.append((metrics["learner/eps_share"], single.engine.lora_state()))
    return start, found


def difference(found: State, other: State, start: State, part: str) -> float:
    """Of the change since the start in all A, or all B: |found − other| / |other − start|."""
    names = [name for name in start if f".lora_{part}." in name]
    apart, moved = (
        np.sqrt(sum(float(np.square(one[name] - two[name], dtype=np.float64).sum()) for name in names))
        for one, two in ((found, other), (other, start))
    )
    return float(apart / moved)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--eps", type=float, nargs="+", default=[1e-8, 1e-10, 1e-12, 1e-15])
    options.add_argument("--looks", type=int, nargs="+", default=[1, 2, 5], metavar="ITERATIONS")
    options.add_argument("--random", type=int, nargs=2, metavar=("BLOCKS", "WIDTH"), help="a random FLUX of this size")
    options.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a setting")
    given = options.parse_args()
    values, looks = (given.eps[:2], [1]) if given.quick else (given.eps, sorted(given.looks))
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"output={folder}/runs", *given.set]
        if given.random:
            settings.insert(0, f"model.path={random_pipeline(*given.random, str(Path(folder) / 'pipeline'))}")
        runs = {eps: run(settings, eps, looks) for eps in values}
    start, first = runs[values[0]]
    rows: list[Row] = []
    for eps, (_, found) in runs.items():
        for look, (share, lora), (_, other) in zip(looks, found, first, strict=True):
            row: Row = {"learner.eps": f"{eps:g}", "iterations": look, "learner/eps_share": share}
            rows.append(row | {f"{part}, relative": difference(lora, other, start, part) for part in "AB"})
    report("Adam's epsilon", rows, given.json, [f"Relative to the change under {values[0]:g}."])


if __name__ == "__main__":
    main()
