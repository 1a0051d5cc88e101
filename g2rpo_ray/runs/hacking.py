"""The hacking panel: signs of reward hacking in the images, compared with the model before training.

Trained rewards rise in either case. These numbers are of the held-out images, or of the LoRA, and no reward knows them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2rpo_ray.analysis.statistics import compare, interval
from g2rpo_ray.config.schema import PanelName
from g2rpo_ray.runs.tracking import Metrics
from g2rpo_ray.types import FloatArray, Images

COARSE = 32  # pixels a side at which images of a prompt are compared: colours and shapes, no texture
WHITE = 0.95  # of 0 to 1, from which on a pixel has no drawing
SMALLEST = 16  # pixels a side of an image that has a spectrum worth the name


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of a number: `factor` times the value of the base, and at least `least` away from it."""

    meaning: str
    factor: float
    least: float
    advice: str = "look at samples/, the policy may exploit what it is trained on"

    def bound(self, base: float) -> float:
        """The value from which on the panel says so."""
        if self.factor < 1:
            return min(base * self.factor, base - self.least)
        return max(base * self.factor, base + self.least)

    def is_passed(self, value: float, base: float) -> bool:
        """False where one of the two is not known."""
        bound = self.bound(base)
        return value < bound if self.factor < 1 else value > bound


LIMITS: dict[PanelName, Limit] = {
    "diversity": Limit("mean distance between the images of a prompt, pixels of 0 to 1", 0.25, 0.01),
    "high_frequency": Limit("share of the spectrum's energy above half of the highest frequency", 2.0, 0.01),
    "periodicity": Limit("correlation of the fine structure with itself, one and two periods on", 1.0, 0.2),
    "saturation": Limit("mean difference of the strongest and the weakest colour channel, 0 to 1", 1.5, 0.05),
    "exposure": Limit("share of pixels that are white, or nearly", 2.0, 0.1),
    "distance": Limit("norm of what the LoRA adds to the weights, of their own", 1.0, 0.5),
    "unseen": Limit("highest upper end of the 95 % intervals of what unseen rewards changed by", 0.5, 0.0),
    "decline": Limit(
        "upper end of the 95 % interval of what the trained rewards changed by since their best evaluation",
        0.5,
        0.0,
        "training loses what it had gained: a smaller learner.lr, learner.kl_beta or finer sampler.strides may keep it",
    ),
}


def image_traces(images: Images) -> dict[str, float]:
    """The numbers of one prompt's images [S, H, W, 3], a seed each; NaN where there are too few or too small ones.

    Of videos [S, F, H, W, 3] the means over their frames.
    """
    if images.ndim == 5:
        of_frames = [image_traces(images[:, frame]) for frame in range(images.shape[1])]
        return {name: float(np.mean([traces[name] for traces in of_frames])) for name in of_frames[0]}
    pixels = images.astype(np.float32) / 255
    spectra = [] if min(pixels.shape[1:3]) < SMALLEST else [_fine_structure(image.mean(axis=-1)) for image in pixels]
    return {
        "diversity": _diversity(pixels),
        "high_frequency": float(np.mean([high for high, _ in spectra])) if spectra else math.nan,
        "periodicity": float(np.mean([period for _, period in spectra])) if spectra else math.nan,
        "saturation": float((pixels.max(axis=-1) - pixels.min(axis=-1)).mean()),
        "exposure": float((pixels.min(axis=-1) > WHITE).mean()),
    }


def panel(
    traces: Sequence[Mapping[str, float]],
    scores: Mapping[str, FloatArray],
    base: Mapping[str, FloatArray],
    unseen: Sequence[str],
    distance: float,
    weights: Mapping[str, float],
    earlier: Sequence[Mapping[str, FloatArray]] = (),
) -> dict[str, float]:
    """The panel of one evaluation.

    Args:
        traces: `image_traces` of each prompt.
        scores: held-out scores [P, S] by reward, `base` those before training.
        unseen: names of the rewards that are not trained on.
        distance: of the LoRA from its start; NaN where it is not known.
        weights: of the trained rewards.
        earlier: `scores` of the evaluations before this one.
    """
    means = {name: _mean([trace[name] for trace in traces]) for name in traces[0]} if traces else {}
    ends = [compare(base[name], scores[name]).high for name in unseen if name in base]
    changed = decline(scores, weights, earlier)
    return {**means, "distance": distance, "unseen": max(ends, default=math.nan), "decline": changed}


def decline(
    scores: Mapping[str, FloatArray], weights: Mapping[str, float], earlier: Sequence[Mapping[str, FloatArray]]
) -> float:
    """The upper end of the 95 % interval of what the weighted trained rewards changed by since they were highest.

    Samples have the same noise at each evaluation, so scores [P, S] are paired. The highest of several is high by
    chance, too: the interval is as wide as one that holds for all earlier evaluations at once (Bonferroni). 0 at the
    first evaluation; NaN where a reward is missing.
    """
    if not weights or any(name not in found for name in weights for found in (scores, *earlier)):
        return math.nan
    now, *before = (np.sum([w * found[name] for name, w in weights.items()], axis=0) for found in (scores, *earlier))
    means = [interval(total).mean for total in before]
    known = [place for place, mean in enumerate(means) if math.isfinite(mean)]
    if not known:
        return 0.0 if not before else math.nan
    best = before[max(known, key=lambda place: means[place])]
    return interval(now - best, chance=0.05 / len(known)).high


def tripped(values: Mapping[str, float], base: Mapping[str, float]) -> dict[PanelName, str]:
    """The numbers of the panel beyond their limits, with a sentence each."""
    found: dict[PanelName, str] = {}
    for name, limit in LIMITS.items():
        value, start = values.get(name, math.nan), base.get(name, math.nan)
        if limit.is_passed(value, start):
            known = f"{name} {value:.3g}, before training {start:.3g}, limit {limit.bound(start):.3g}"
            found[name] = f"{known}: {limit.advice}"
    return found


def _diversity(pixels: NDArray[Any]) -> float:
    """Root mean square difference of coarse pixels, over all pairs of images."""
    count, height, width, _ = pixels.shape
    if count < 2:
        return math.nan
    rows, columns = (max(1, size // COARSE) for size in (height, width))
    cut = pixels[:, : height // rows * rows, : width // columns * columns]
    coarse = cut.reshape(count, height // rows, rows, width // columns, columns, 3).mean(axis=(2, 4)).reshape(count, -1)
    pairs = [np.sqrt(((a - b) ** 2).mean()) for i, a in enumerate(coarse) for b in coarse[:i]]
    return float(np.mean(pairs))


def _fine_structure(light: NDArray[Any]) -> tuple[float, float]:
    """Share of high frequencies, and periodicity, of a lightness [H, W]."""
    power = np.abs(np.fft.fft2(light - light.mean())) ** 2
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(size) for size in light.shape), indexing="ij"))  # 0 to 0.71
    fine = power * (frequency > 1 / 8)  # without shapes and shading
    if fine.sum() <= 1e-9 * light.size:
        return 0.0, 0.0
    again = np.fft.ifft2(fine).real
    along = [again[0] / again[0, 0], again[:, 0] / again[0, 0]]
    periods = [min(line[p], line[2 * p]) for line in along for p in range(2, len(line) // 4 + 1)]
    return float(power[frequency > 1 / 4].sum() / power.sum()), float(max(periods))


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if math.isfinite(value)]
    return sum(there) / len(there) if there else math.nan


def hacked(window: Sequence[Metrics], trained: Sequence[str], judges: Sequence[str]) -> bool:
    """Whether every trained reward rose and every judge fell, from the first half of the window to the second.

    Both are means over the anchors: on-policy samples without noise. Where these are not scored, nothing is known.
    """
    if any(f"eval/{name}/mean" not in line for line in window for name in (*trained, *judges)):
        return False

    def rise(name: str) -> float:
        scores = np.array([line[f"eval/{name}/mean"] for line in window])
        return float(scores[len(scores) // 2 :].mean() - scores[: len(scores) // 2].mean())

    return bool(judges) and all(rise(name) > 0 for name in trained) and all(rise(name) < 0 for name in judges)
