"""Runs for a report."""

import numpy as np
import pytest

from g2rpo_ray.algo.tree import Shape, plan_tree
from g2rpo_ray.config import load_config
from g2rpo_ray.rollout.metrics import rollout_metrics
from g2rpo_ray.runs.journal import Journal, summarize
from g2rpo_ray.types import Place, PromptRollout, Rollout, Samples, Span, UnitReport

PROMPTS = ["a <b>bold</b> cat", "a dog & a fox"]

UPDATE = {"learner/clip_fraction": 0.25, "learner/ratio_max_dev": 1e-3, "mismatch/velocity": 1e-7,
          "advantage/std": 1.5}  # fmt: skip

SPANS = [Span("rollout-0", "10.0.0.1", "trunk/0/0", 1.0, 2.0, 0), Span("run", "driver", "update", 3.0, 1.0)]


def a_run(output, name, iterations, done, rise=0.1, seed=0):
    """What a run leaves: the quickstart's settings, a prompt of two children an iteration, two held-out prompts."""
    sets = [f"name={name}", f"output={output}", f"iterations={iterations}", "tracking.tensorboard=false"]
    config = load_config(None, [*sets, f"seed={seed}"])
    folder = output / name
    tree = plan_tree(Shape(4, children=2, strides=(1, 2)))
    reports = [UnitReport("trunk/0/0", "rollout-0", Place(1, "n", "a"), 0.0, 0, 10, 1, 2.0, 0.5)]
    with Journal(config, folder, 0) as journal:
        journal.heldout(0, samples(0.0))
        for i in range(1, done + 1):
            scores = np.linspace(0, rise * i, len(tree.leaf), dtype=np.float32)[None]
            prompt = PromptRollout(i, 0, "p", tree, scores, None, None, ())
            anchors = {name: np.array([rise * i], np.float32) for name in config.all_rewards}
            if i == done:
                journal.heldout(i, samples(rise))
            counts = {"pool/restarts": float(i == 1), "perf/lost_s": 2.0 * (i == 1)}
            rollout = Rollout([prompt], anchors, reports, i, 2.0, 1.5)
            journal.iteration(i, {**rollout_metrics(rollout, config), **UPDATE}, counts, SPANS)
        if done == iterations:
            summarize(config, folder, done)
    return folder


def samples(rise):
    pictures = [np.full((32, 32, 3), 40 + 500 * rise, np.uint8), np.full((32, 32, 3), 60, np.uint8)]
    trained = np.array([[0.2, 0.4], [0.1, 0.2]], np.float32) + np.float32(rise)
    unseen = np.array([[0.5, np.nan], [0.5, 0.5]], np.float32)
    scores = {"preference": trained, "colour": unseen, "shape": 1 - trained}
    return Samples(PROMPTS, scores, pictures, 40)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    return [a_run(output, "ended", 4, 4), a_run(output, "going-on", 9, 3, rise=0.2, seed=7)]
