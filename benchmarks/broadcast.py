"""Weights on their way: a LoRA in FLUX.1-dev's shape from the driver to all actors, checksum and loading included.

tests/isolated python benchmarks/broadcast.py
"""

import time
from typing import Any

import numpy as np
from common import Row, median, parser, report

from g2rpo_ray.models.flux import Model  # isort: skip  # common makes the packages importable

H = 3072  # FLUX: 19 blocks with two streams, 38 with one


def flux_shapes(rank: int) -> dict[str, tuple[int, int]]:
    """The adapter that FLUX.1 gets by default: attention's projections, each [rank, in] and [out, rank]."""
    layers = [f"transformer_blocks.{block}.{end}" for block in range(19) for end in Model.lora_targets]
    layers += [f"single_transformer_blocks.{block}.attn.to_{part}" for block in range(38) for part in "qkv"]
    return {f"{layer}.lora_{m}.weight": (rank, H) if m == "A" else (H, rank) for layer in layers for m in "AB"}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--iteration-s", type=float, default=37.0, help="an iteration: 16 prompts, 64 H100")
    options.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64, 128], help="of the LoRA")
    options.add_argument("--actors", type=int, nargs="+", default=[1, 4, 16])
    given = options.parse_args()
    import ray

    from g2rpo_ray.actors.workers.weights import PublishedWeights
    from g2rpo_ray.models import manifest_of

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=2_000_000_000, log_to_driver=False
    )

    @ray.remote(num_cpus=0)
    class Receiver:
        """What a rollout actor does with new weights, without the model: fetch, verify, copy in place."""

        def __init__(self) -> None:
            self._state: dict[str, np.ndarray] = {}

        def receive(self, weights: Any) -> float:
            start = time.perf_counter()
            state = weights.fetch()
            if {name: array.shape for name, array in state.items()} != {n: a.shape for n, a in self._state.items()}:
                self._state = {}  # another rank than before
            for name, array in state.items():
                np.copyto(self._state.setdefault(name, np.empty_like(array)), array)
            return time.perf_counter() - start

    ranks, counts, repeats = given.ranks, given.actors, given.repeats
    if given.quick:
        ranks, counts, repeats = [8], [2], 1
    receivers = [Receiver.remote() for _ in range(max(counts))]  # type: ignore[attr-defined]
    warm = PublishedWeights(manifest_of({}, 0), ray.put({}))
    ray.get([receiver.receive.remote(warm) for receiver in receivers])
    rows: list[Row] = []
    for rank in ranks:
        draw = np.random.default_rng(rank)
        state = {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in flux_shapes(rank).items()}
        measured: dict[int, list[tuple[float, float, float]]] = {count: [] for count in counts}
        for _, count in ((_, count) for _ in range(repeats) for count in counts):
            start = time.perf_counter()
            manifest = manifest_of(state, 1)
            described = time.perf_counter()
            weights = PublishedWeights(manifest, ray.put(state))
            published = time.perf_counter()
            ray.get([receiver.receive.remote(weights) for receiver in receivers[:count]])
            measured[count].append((described - start, published - described, time.perf_counter() - published))
            del weights
        for count, times in measured.items():
            checksum, put, received = (median(part) for part in zip(*times, strict=True))
            total = checksum + put + received
            rows.append(
                {
                    "rank": rank, "MB": manifest.bytes / 1e6, "tensors": manifest.tensors, "actors": count,
                    "checksum s": checksum, "put s": put, "received, verified s": received, "in all s": total,
                    f"share of {given.iteration_s:g} s": total / given.iteration_s,
                }
            )  # fmt: skip
    note = f"Median of {repeats}. All receivers on this machine: they share its cores and one copy in the object store."
    report("Broadcast of a LoRA, FLUX.1-dev's shape", rows, given.json, [note])
    ray.shutdown()


if __name__ == "__main__":
    main()
