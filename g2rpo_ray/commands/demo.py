"""A web page that shows base and tuned images of the same noise: `python -m g2rpo_ray.demo --adapter RUN`.

prompt, seed, steps, share ─► Studio: one model, one LoRA after the other ─► images and their scores ─► Gradio
"""

import argparse
import logging
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from g2rpo_ray.analysis.video import strip
from g2rpo_ray.config import Config, load_config
from g2rpo_ray.data import negative_prompts, read_records
from g2rpo_ray.data.pictures import picture_file, with_sources
from g2rpo_ray.evaluation.adapters import Adapter, read_adapters
from g2rpo_ray.exits import INVALID, Parser, command
from g2rpo_ray.messages import one_line
from g2rpo_ray.numerics import set_up_torch
from g2rpo_ray.preflight import check_models
from g2rpo_ray.runs.storage import Folder
from g2rpo_ray.types import Images, Metadata, PromptEmbedding, SampleUnit, sources_in, sources_of, text_of

logger = logging.getLogger(__name__)

NOT_COPIED = ("checkpoints", "embeddings", "samples", "timeline", "tensorboard")  # of a run on object storage
MAX_PROMPT, MAX_STEPS, MAX_SEED = 1000, 100, 2**31 - 1
MIN_SHOWN_SIZE = 256  # pixels; smaller images are enlarged by a whole factor


@dataclass(frozen=True, slots=True)
class Shown:
    """One adapter's image [H, W, 3] and its scores by reward."""

    adapter: str
    picture: Images
    scores: Mapping[str, float]


class Studio:
    """The model, the adapters and the rewards, in this process. It makes one image at a time."""

    def __init__(self, config: Config, adapters: Sequence[Adapter], scored: bool = True):
        """
        Raises:
            ValueError: one line; the model or a reward cannot be loaded on this machine.
        """
        from g2rpo_ray.models import FlowModel
        from g2rpo_ray.rewards import open_reward
        from g2rpo_ray.rollout.sampler import Sampler

        _prepare(config)
        self.config, self.adapters = config, list(adapters)
        device = config.rollout.device
        self._model = FlowModel.load(config.rollout_model, device, transformer=True, vae=True, text_encoders=True)
        self._sampler = Sampler(config, self._model)
        rewards = config.all_rewards.items() if scored else ()
        self._rewards = {name: open_reward(reward) for name, reward in rewards}
        self._lock = threading.Lock()

    def draw(self, prompt: str, seed: int, steps: int, share: float, source: str | None = None) -> list[Shown]:
        """An image of the prompt by every adapter, the base first, with the noise of `evaluate` for the same seed.

        Args:
            prompt: 1 to 1000 characters.
            seed: 0 to 2^31 - 1.
            steps: sampling steps, 1 to 100.
            share: part of the steps that adapters make, 0 to 1; the base makes the rest.
            source: file of the image to edit.

        Raises:
            ValueError: one line; a value is outside its bounds.
        """
        if not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise ValueError(f"prompt: {len(prompt)} characters given; type 1 to {MAX_PROMPT}")
        if not (1 <= steps <= MAX_STEPS and 0 <= seed <= MAX_SEED and 0 <= share <= 1):
            raise ValueError(
                f"steps {steps}, seed {seed}, share {share:g} given; steps are 1 to {MAX_STEPS}, "
                f"seeds 0 to {MAX_SEED}, the share 0 to 1"
            )
        files = [picture_file(source, Path())] if source else []
        prompt, known = with_sources(prompt, files), {"source": tuple(files)} if files else {}
        shown = []
        with self._lock:
            embedding = self._embedding(prompt, {sources_of(prompt): [file.open() for file in files]})
            if cut := self._model.take_cut_message():
                logger.warning(cut)
            for number, adapter in enumerate(self.adapters):
                self._sampler.load_weights(adapter.state)
                unit = SampleUnit(prompt, (seed,), steps, share if number else 1.0)
                images = self._sampler.sample(unit, embedding)
                scores = {name: self._score(name, images, prompt, known) for name in self._rewards}
                shown.append(Shown(adapter.name, strip(images[0]), scores))
        return shown

    def _score(self, name: str, images: Images, prompt: str, known: Metadata) -> float:
        """The score of one image [1, H, W, 3]; NaN where the reward cannot judge it, as for a prompt unknown to it."""
        from g2rpo_ray.rewards import ask

        try:
            return float(ask(self._rewards[name], images, [prompt], [known], self.config.all_rewards[name].frames)[0])
        except Exception as error:  # a reward of the user's may raise anything
            logger.warning("reward %s: no score for %r: %s", name, prompt, one_line(error))
            return math.nan

    def _embedding(self, prompt: str, sources: Mapping[str, Sequence[Image.Image]]) -> PromptEmbedding:
        (embedding,) = self._model.encode([prompt], sources)
        away = negative_prompts(self.config.model.negative_prompt, [prompt])
        return replace(embedding, negative=next(iter(self._model.encode(away, sources, negative=True)), None))


def build_page(studio: Studio, example: str, source: Image.Image | None = None) -> Any:
    """The Gradio page of a studio; it fetches nothing from a network."""
    import gradio as gr

    sampler = studio.config.sampler
    with gr.Blocks(title="g2rpo_ray demo", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Base and tuned, on the same noise\n{studio.config.model.path}, base and "
            + ", ".join(adapter.name for adapter in studio.adapters[1:])
        )
        prompt = gr.Textbox(label="Prompt", value=example, max_length=MAX_PROMPT, lines=1)
        with gr.Row():
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=MAX_SEED)
            steps = gr.Slider(1, MAX_STEPS, value=sampler.steps, step=1, label="Sampling steps")
            share = gr.Slider(0, 1, value=1, step=0.05, label="Adapter share of the steps, from the first")
        edits = studio.config.model.sources > 0
        picture = gr.Image(source, label="Source", type="filepath", format="png", visible=edits)
        button = gr.Button("Draw", variant="primary")
        outputs: list[Any] = []
        with gr.Row():
            for adapter in studio.adapters:
                with gr.Column(min_width=MIN_SHOWN_SIZE):
                    outputs.append(gr.Image(label=adapter.name, format="png", interactive=False, buttons=["download"]))
                    outputs.append(gr.Markdown())

        def draw(prompt: str, seed: int, steps: int, share: float, source: str | None) -> list[Any]:
            try:
                shown = studio.draw(prompt, int(seed), int(steps), share, source if edits else None)
            except ValueError as error:
                raise gr.Error(str(error)) from None
            return [value for one in shown for value in (_enlarged(one.picture), _caption(one))]

        for event in (button.click, prompt.submit, page.load):
            event(draw, [prompt, seed, steps, share, picture], outputs, concurrency_limit=1, api_visibility="private")
    return page


def _enlarged(picture: Images) -> Image.Image:
    image = Image.fromarray(picture)
    factor = max(1, -(-MIN_SHOWN_SIZE // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _caption(shown: Shown) -> str:
    known = {name: "not scored" if math.isnan(score) else f"{score:.4g}" for name, score in shown.scores.items()}
    return "\n".join(f"- {name}: **{score}**" for name, score in known.items())


def _prepare(config: Config) -> None:
    import torch

    set_up_torch(config.deterministic, config.rollout.threads)  # as in a rollout actor, for the same bits
    if config.rollout.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "rollout.resources: GPU given, but torch finds no GPU on this machine; give "
            "--set 'rollout.resources={CPU: 1}'"
        )


def _find(given: Sequence[str], stack: ExitStack) -> tuple[str | None, list[str]]:
    """The settings of the first run among the arguments, or None, and every adapter as NAME=PATH."""
    config, named = None, []
    for argument in given:
        name, separator, place = argument.rpartition("=")
        folder = Folder(place)
        if folder.exists("config.yaml"):
            run = stack.enter_context(folder.workspace(NOT_COPIED))
            config = config or str(run / "config.yaml")
            named.append(f"{name or str(folder).partition('?')[0].rstrip('/').rpartition('/')[2]}={run / 'lora'}")
        elif separator:
            named.append(argument)
        else:
            raise ValueError(f"--adapter: {argument} given, which is not a run's folder; give one, or NAME=PATH")
    return config, named


def _page(options: argparse.Namespace, stack: ExitStack) -> Any:
    if not 0 < options.port < 65536:
        raise ValueError(f"--port: {options.port} given; must be 1 to 65535")
    found, named = _find(options.adapter, stack)
    config = load_config(options.config or found, options.set)
    check_models(config)
    heldout = read_records(config.data.heldout_prompts, "data.heldout_prompts", config.model.sources)
    example, known = next(iter(heldout.items()))
    source = next((file.open() for file in sources_in(known)), None)
    studio = Studio(config, read_adapters(named, config), scored=not options.no_scores)
    return build_page(studio, text_of(example), source)


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo demo`."""
    parser = Parser(
        prog="python -m g2rpo_ray.demo",
        description="Serve a web page that shows base and tuned images of the same noise, with the rewards' scores.",
        epilog="example: python -m g2rpo_ray.demo --adapter runs/quickstart",
    )
    parser.add_argument(
        "--adapter", metavar="RUN|NAME=PATH", nargs="+", required=True, help="runs, or adapters by name"
    )
    parser.add_argument("--config", metavar="FILE", help="settings; default: those of the first run")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override section.key=value")
    parser.add_argument("--no-scores", action="store_true", help="load no rewards")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="make the page public through Gradio's tunnel")
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Serves the page; returns the exit status: 0 done, 2 invalid input."""
    with ExitStack() as stack:
        try:
            import gradio as gr

            page = _page(options, stack)
            theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no network for fonts
            page.launch(server_name=options.host, server_port=options.port, share=options.share, theme=theme)
        except ImportError:
            print("error: the demo needs Gradio: pip install 'g2rpo_ray[demo]'", file=sys.stderr)
            return INVALID
    return 0
