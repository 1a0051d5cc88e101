"""The images of a report: held-out prompts after every evaluation, as data for the page's slider."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from g2rpo_ray.analysis.video import animation, unstrip
from g2rpo_ray.runs.reader import Evaluation, Run
from g2rpo_ray.types import Images, text_of

MAX_WIDTH = 320  # pixels; wider pictures are scaled down
MAX_EVALUATIONS = 12  # shown, including the first and the last


def gallery(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Prompts, iterations, and the images [iteration][prompt] of each column: sources, if any, base, runs."""
    shown = [run for run in runs if any(evaluation.pictures for evaluation in run.evaluations.values())]
    if not shown:
        return None
    of_run = [_prompts(run) for run in shown]
    prompts = [prompt for prompt in of_run[0] if all(prompt in others for others in of_run)]
    if not prompts:
        return None
    every = sorted({done for run in shown for done in run.evaluations})
    iterations = [every[at] for at in np.unique(np.linspace(0, len(every) - 1, MAX_EVALUATIONS).round().astype(int))]
    first = shown[0].evaluations[min(shown[0].evaluations)]
    base = [_shown(first, prompt, shown[0].frames) for prompt in prompts]
    columns = [{"name": "before", "pictures": [base] * len(iterations)}]
    if sources := dict(zip(of_run[0], shown[0].sources, strict=False)):
        source_column = [{"source": data_uri(sources[prompt]), "scores": ""} for prompt in prompts]
        columns.insert(0, {"name": "source", "pictures": [source_column] * len(iterations)})
    for run in shown:
        made: dict[int, list[dict[str, str]]] = {}
        for done in iterations:
            at = max((d for d in run.evaluations if d <= done), default=min(run.evaluations))
            made[done] = [_shown(run.evaluations[at], prompt, run.frames) for prompt in prompts]
        columns.append({"name": run.name if len(runs) > 1 else "now", "pictures": list(made.values())})
    small = unstrip(first.pictures[0], shown[0].frames)[0].shape[1] < MAX_WIDTH / 2
    texts = [text_of(prompt) for prompt in prompts]
    return {"prompts": texts, "iterations": iterations, "columns": columns, "small": small}


def _prompts(run: Run) -> list[str]:
    evaluation = run.evaluations[max(run.evaluations)]
    return list(evaluation.prompts[: len(evaluation.pictures)])


def _shown(evaluation: Evaluation, prompt: str, frames: int) -> dict[str, str]:
    at = list(evaluation.prompts).index(prompt)
    scores = "\n".join(f"{name} {scores[at, 0]:.3g}" for name, scores in evaluation.scores.items())
    return {"source": data_uri(evaluation.pictures[at], frames), "scores": scores}


def data_uri(picture: Images, frames: int = 1) -> str:
    """The data URI of an image [H, W, 3]: small ones unchanged, others reduced and as WebP; videos are animated."""
    images, stream = [Image.fromarray(each) for each in unstrip(picture, frames)], io.BytesIO()
    image = images[0]
    if frames > 1:
        for each in images:
            each.thumbnail((MAX_WIDTH, MAX_WIDTH))
        stream.write(animation(images))
        kind = "webp"
    elif image.width <= MAX_WIDTH / 2:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((MAX_WIDTH, MAX_WIDTH))
        image.save(stream, "WEBP", quality=80)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
