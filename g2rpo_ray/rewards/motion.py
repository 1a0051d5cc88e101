"""Motion of videos by optical flow (Farnebäck's method, of OpenCV): no model, no weights, no prompt.

Legend: N videos, F frames, H, W pixels. A flow [H, W, 2] says where each pixel of a frame is in the next one: x, y.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LARGEST = 0.05  # share of the pixels, those that move most, that decide the dynamic degree: VBench's
PIXELS = 256  # of the shorter edge, in which the dynamic degree counts
PYRAMID, LEVELS, WINDOW, ITERATIONS, NEIGHBOURS, SMOOTHING = 0.5, 3, 15, 3, 5, 1.2  # of Farnebäck's method
Pixels = NDArray[np.uint8]
Flow = NDArray[np.float32]


class Motion:
    """A number of each pair of neighbouring frames; the score is their mean."""

    scope = "video"

    def __init__(self, name: str, of_pair: Callable[[Pixels, Pixels], float]):
        self._name, self._of_pair = name, of_pair

    def score(self, images: Pixels, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Scores float32 [N] of videos uint8 [N, F, H, W, 3].

        Raises:
            ValueError: there are not two frames.
        """
        if images.ndim != 5 or images.shape[1] < 2:
            frames = images.shape[1] if images.ndim == 5 else 1
            raise ValueError(f"reward {self._name}: model.frames is {frames}; motion needs 2 or more")
        return np.array([self._one(video) for video in images], np.float32)

    def _one(self, video: Pixels) -> float:
        return float(np.mean([self._of_pair(*pair) for pair in pairwise(video)]))


def dynamic_degree() -> Motion:
    """How far things move from one frame to the next, as VBench's dynamic degree before its threshold of 6.

    The mean length of the longest 5 % of the flow, in pixels of a picture whose shorter edge has 256.
    """
    flow = _flow()

    def degree(one: Pixels, other: Pixels) -> float:
        lengths = np.sort(np.linalg.norm(flow(one, other), axis=-1), axis=None)
        largest = lengths[-max(1, int(LARGEST * lengths.size)) :]
        return float(largest.mean()) * PIXELS / min(one.shape[:2])

    return Motion("dynamic_degree", degree)


def temporal_consistency() -> Motion:
    """How like a frame is what the next one becomes when its motion is undone: 1 where nothing flickers.

    1 − the mean difference of the colours, of 0 to 1. A video without motion has 1, too: see `dynamic_degree`.
    """
    flow = _flow()
    import cv2

    def likeness(one: Pixels, other: Pixels) -> float:
        rows, columns = np.mgrid[: one.shape[0], : one.shape[1]].astype(np.float32)
        moved = flow(one, other)
        undone = cv2.remap(
            other, columns + moved[..., 0], rows + moved[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        return 1 - float(np.abs(undone.astype(np.float32) - one.astype(np.float32)).mean()) / 255

    return Motion("temporal_consistency", likeness)


def _flow() -> Callable[[Pixels, Pixels], Flow]:
    """The flow from one frame to another. Raises ValueError in one line where OpenCV is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"reward motion: {error}; pip install opencv-python-headless") from error
    cv2.setNumThreads(1)  # the same bits on any machine, and the server's threads are the scheduler's to give

    def flow(one: Pixels, other: Pixels) -> Flow:
        before, after = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (one, other))
        start = np.zeros((*one.shape[:2], 2), np.float32)
        found = cv2.calcOpticalFlowFarneback(
            before, after, start, PYRAMID, LEVELS, WINDOW, ITERATIONS, NEIGHBOURS, SMOOTHING, 0
        )
        return np.asarray(found, np.float32)

    return flow
