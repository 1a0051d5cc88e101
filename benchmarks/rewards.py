"""A reward server: images a second by batch size, and how long a unit's images wait for their scores under load.

python benchmarks/rewards.py                        the embedded preference model
python benchmarks/rewards.py --architecture ViT-H-14 [--device cuda --dtype float16]    HPSv2.1's size, random weights
python benchmarks/rewards.py --models               every model at its published size, random weights: memory, speed
"""

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
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


CLIP_L, CLIP_H = ((768, 12), (1024, 24)), ((1024, 24), (1280, 32))  # width and layers of text, of vision


def _transformers_clip(sizes: Any, projection: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    text, vision = (
        {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": 12 if width == 768 else 16, "projection_dim": projection,
        }
        for width, layers in sizes
    )  # fmt: skip
    vision |= {"patch_size": 14, "image_size": 224}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))


def published(name: str, device: str, dtype: torch.dtype) -> Any:
    """A reward at the size of its published checkpoint, with random weights; vocabularies are the quickstart's."""
    import open_clip
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    from g2rpo_ray.paths import resolve
    from g2rpo_ray.rewards import aesthetic, clip, imagereward, pickscore

    if name == "hpsv2":
        shape = load_architecture("ViT-H-14")
        return HPSv2(new_network(shape), shape, device, dtype)
    if name == "clip":
        shape = clip.load_architecture("ViT-H-14-quickgelu")
        return clip.CLIPScore(open_clip.CLIP(**shape), shape, True, device, dtype)
    if name == "pickscore":
        tokenizer = CLIPTokenizer.from_pretrained(Path(resolve("embedded:pipeline")) / "tokenizer")
        return pickscore.PickScore(_transformers_clip(CLIP_H, 1024), CLIPImageProcessorPil(), tokenizer, device, dtype)
    if name == "imagereward":
        words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
        bert = BertWordPieceTokenizer(words)
        bert.enable_padding(length=imagereward.MAX_TOKENS)
        return imagereward.ImageReward(imagereward.Network(imagereward.ARCHITECTURE), bert, 224, device, dtype)
    network = _transformers_clip(CLIP_L, 768)
    del network.text_model
    return aesthetic.Aesthetic(network, aesthetic.ScoreHead(768), device, dtype)


def measure_model(name: str, device: str, dtype: str, threads: int, size: int, batches: list[int]) -> Row:
    """Seconds and peak memory [GB] of one model; in a process of its own, whose memory is the model's alone."""
    torch.set_num_threads(threads)
    reward = published(name, device, getattr(torch, dtype))
    images = np.random.default_rng(0).integers(0, 256, (max(batches), size, size, 3), dtype=np.uint8)
    row: Row = {"model": name}
    for batch in batches:
        seconds = []
        for _ in range(2 if batch == 1 else 1):  # the first one warms up
            start = time.perf_counter()
            reward.score(images[:batch], ["a red circle"] * batch)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * _peak_kilobytes()
        row |= {f"images/s, batch {batch}": batch / seconds[-1], f"peak GB, batch {batch}": peak / 1e9}
    return row


def _peak_kilobytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def models(given: Any) -> None:
    """The table of all models."""
    batches, size = ([1] if given.quick else [1, 32]), given.size or 720
    names = ["aesthetic"] if given.quick else ["hpsv2", "clip", "pickscore", "imagereward", "aesthetic"]
    rows = []
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            arguments = (name, given.device, given.dtype, given.threads, size, batches)
            rows.append(process.submit(measure_model, *arguments).result())
    note = f"{given.dtype} on {given.device}, {given.threads} threads, {size} px; memory is that of the whole process."
    report("Reward models at their published sizes, random weights", rows, given.json, [note])


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
    options.add_argument("--models", action="store_true", help="every reward model at its published size")
    given = options.parse_args()
    if given.models:
        models(given)
        return
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
