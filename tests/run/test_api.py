"""The package as a Python library: settings, rewards and prompts as Python values, runs in notebooks and threads."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import g2rpo_ray
from g2rpo_ray import load_config
from g2rpo_ray.actors.interrupt import Interrupt, run_interruptible
from g2rpo_ray.algo.kernels import transition
from g2rpo_ray.algo.objectives import edge_losses, needs_drift, policy_loss
from g2rpo_ray.algo.schedule import shifted_sigmas
from g2rpo_ray.algo.tree import Shape, groups, plan_tree
from g2rpo_ray.commands.train import main
from g2rpo_ray.config import dump_config, with_settings
from g2rpo_ray.config.resume import differences, settings
from g2rpo_ray.data import fingerprint, read_records
from g2rpo_ray.exits import RunInterrupted
from g2rpo_ray.learner.rendezvous import alone
from g2rpo_ray.models import describe_model, lora_shapes
from g2rpo_ray.rewards import NotScores, ask, check_reward, open_reward
from tests.support import preloaded
from tests.support.hub import serve_hub
from tests.support.own_parts import (
    PROMPTS,
    own,  # noqa: F401  fixtures
)

ROOT = Path(__file__).parents[2]


def brightness(images, prompts):
    return images.mean((1, 2, 3)) / 255


def test_each_public_name_is_loaded_when_it_is_used():
    program = (
        "import sys, g2rpo_ray; print(*[name for name in sys.modules if name.startswith('g2rpo_ray.')]);"
        "print(*[getattr(g2rpo_ray, name).__name__ for name in g2rpo_ray.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["g2rpo_ray.version", *g2rpo_ray.__all__]
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(g2rpo_ray, "no_such_name")  # noqa: B009


def test_the_rendezvous_of_one_process_ends_with_the_engine_s_start(monkeypatch):
    """Else torchrun, started by the same notebook, would wait for a store that is not its own."""
    monkeypatch.setenv("MASTER_ADDR", "of the user")
    monkeypatch.delenv("RANK", raising=False)
    before = dict(os.environ)
    for _ in range(2):  # two runs in a process
        with alone("cpu"):
            assert (os.environ["MASTER_ADDR"], os.environ["RANK"], os.environ["DS_ACCELERATOR"]) == (
                "127.0.0.1",
                "0",
                "cpu",
            )
        assert dict(os.environ) == before


def test_keywords_are_the_overrides_of_the_command_line():
    text = ["method=mix_grpo", "learner.lr=0.002", "rewards.preference.weight=2", "sampler.strides=[1]"]
    values = {"learner.lr": 2e-3, "rewards.preference.weight": 2, "sampler.strides": (1,)}
    assert load_config("quickstart", method="mix_grpo", **values) == load_config("quickstart", text)
    with pytest.raises(ValueError, match=r"^learner\.lr: 'fast' given; [^\n]*$"):
        load_config(**{"learner.lr": "fast"})
    with pytest.raises(ValueError, match=r"^learner: unknown|^learner\.speed: unknown key"):
        load_config(**{"learner.speed": 1})


def test_a_function_is_a_reward_in_settings_and_a_digest_in_files(tmp_path, capsys):
    given = {"plain": brightness, "more": {"kind": brightness, "weight": 2, "resources": {"CPU": 1}}}
    config = with_settings(load_config(eval_rewards={}), {"rewards": given})
    assert config.rewards["plain"].resources == {}
    assert (config.rewards["more"].weight, config.rewards["more"].resources) == (2, {"CPU": 1})
    images = np.full((2, 4, 4, 3), 51, np.uint8)
    assert ask(open_reward(config.rewards["plain"]), images, ["", ""]).tolist() == pytest.approx([0.2, 0.2])
    assert check_reward("rewards.plain", config.rewards["plain"]) == []
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert main(["--config", f"{tmp_path}/config.yaml", "--set", f"output={tmp_path}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: rewards.plain.options.function: brightness (")
    assert "train(config, rewards={...})" in printed
    assert printed.count("\n") == 1


def test_a_run_does_not_go_on_with_another_function():
    def made_with(function):
        return settings(load_config(rewards={"mine": function}, eval_rewards={}), [], [], {})

    again = made_with(lambda images, prompts: images.mean((1, 2, 3)))
    assert differences(again, made_with(lambda images, prompts: images.mean((1, 2, 3)))) == {}
    (key,) = differences(again, made_with(lambda images, prompts: images.std((1, 2, 3))))
    assert key == "rewards.mine.options.function"


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0.5, None],
        (1, 0.5, float("nan")),
        np.array([1, 0.5, np.nan]),
        np.array([1, 0.5, None], object),
        torch.tensor([1, 0.5, float("nan")], dtype=torch.bfloat16, requires_grad=True),
    ],
    ids=["list", "tuple", "float64", "objects", "tensor"],
)
def test_scores_become_float32_and_none_is_missing(scores):
    reward = open_reward(load_config(rewards={"mine": lambda images, prompts: scores}).rewards["mine"])
    found = ask(reward, np.zeros((3, 2, 2, 3), np.uint8), [""] * 3)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([1, 0.5, np.nan], nan_ok=True)


@pytest.mark.parametrize("scores", [[1.0, 2.0], 1.0, np.zeros((3, 1)), ["1", "2", "3"], None, [[1], [2, 3], []], {}])
def test_what_is_not_a_number_an_image_is_refused_in_one_line(scores):
    reward = open_reward(load_config(rewards={"mine": lambda images, prompts: scores}).rewards["mine"])
    with pytest.raises(NotScores, match=r"^score\(\) returned [^\n]*; expected 3 numbers, one per image$"):
        ask(reward, np.zeros((3, 2, 2, 3), np.uint8), [""] * 3)


class Table:
    """As much of a `datasets.Dataset` as is asked for."""

    def __init__(self, rows):
        self._rows, self.column_names = rows, list(rows[0])

    def select_columns(self, names):
        return Table([{name: row[name] for name in names} for row in self._rows])

    def __iter__(self):
        return iter(self._rows)


def test_prompts_of_a_list_a_dataset_and_a_file_are_the_same(tmp_path):
    rows = [{"prompt": prompt, "metadata": {"tag": "t"}} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [tmp_path / "prompts.jsonl", rows, tuple(rows), Table([{**row, "image": object()} for row in rows])]
    try:
        from datasets import Dataset
    except ImportError:
        pass
    else:
        given.append(Dataset.from_list([{**row, "id": 1} for row in rows]))
    configs = [load_config(**{"data.train_prompts": prompts}) for prompts in given]
    found = [read_records(config.data.train_prompts, "data.train_prompts") for config in configs]
    assert all(records == {prompt: {"tag": "t"} for prompt in PROMPTS} for records in found)
    (tmp_path / "config.yaml").write_text(dump_config(configs[1]))
    assert load_config(tmp_path / "config.yaml") == configs[1]
    texts = load_config(**{"data.train_prompts": PROMPTS}).data.train_prompts
    assert read_records(texts, "data.train_prompts") == {prompt: {} for prompt in PROMPTS}
    with pytest.raises(ValueError, match=r"^data\.train_prompts: entry 1 has no prompt or caption or text, only name"):
        read_records(load_config(**{"data.train_prompts": [{"name": "x"}]}).data.train_prompts, "data.train_prompts")
    with pytest.raises(ValueError, match=r"^data\.train_prompts: 5 given; [^\n]*$"):
        load_config(**{"data.train_prompts": 5})


async def until_asked(interrupt: Interrupt) -> str:
    end = time.monotonic() + 30
    while not interrupt and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return "asked" if interrupt else "not asked"


def test_an_event_loop_runs_inside_another_and_signals_reach_it():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)

    async def notebook():
        return run_interruptible(until_asked)

    assert asyncio.run(notebook()) == "asked"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_that_is_not_the_main_one_handles_no_signals():
    async def work(interrupt):
        return bool(interrupt)

    found = []
    thread = threading.Thread(target=lambda: found.append(run_interruptible(work)))
    thread.start()
    thread.join(30)
    assert found == [False]


def test_a_second_signal_cancels_what_the_first_one_did_not_end():
    async def forever(interrupt):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(30)

    with pytest.raises(RunInterrupted):
        run_interruptible(forever)


def test_a_kernel_of_ones_own_is_one_file(own):
    x, velocity, noise = torch.randn(3, 2, 5, 4)
    given = {"x": x, "velocity": velocity, "sigmas": shifted_sigmas(8, 3.0), "index": 2, "eta": 0.3, "noise": noise}
    like, mine = (transition(kernel, **given) for kernel in ("dance", "mine:kernel"))
    assert torch.equal(like.next_x, mine.next_x)
    assert torch.equal(like.log_prob, mine.log_prob)
    assert load_config(**{"sampler.kernel": "mine:kernel"}).sampler.kernel == "mine:kernel"
    with pytest.raises(ValueError, match=r"^sampler\.kernel: mine:still given, which has no noise in a step that ends"):
        load_config(**{"sampler.kernel": "mine:still", "sampler.branch_steps": [9]})


def test_an_objective_of_ones_own_is_one_file(own):
    new, old, advantage, drift = torch.randn(4, 6)
    given = {"clip_range": 0.1, "drift": drift}
    assert torch.equal(edge_losses("mine:objective", new, old, advantage, **given),
                       edge_losses("clip", new, old, advantage, **given))  # fmt: skip
    assert torch.equal(edge_losses("mine:moving", new, old, advantage, **given), drift - advantage * (new - old))
    assert (needs_drift("mine:objective"), needs_drift("mine:moving")) == (False, True)
    loss, metrics = policy_loss("mine:objective", new, old, advantage, clip_range=0.1)
    assert loss == policy_loss("clip", new, old, advantage, clip_range=0.1)[0]
    assert metrics.keys() == {"ratio_mean", "clip_fraction", "ratio_max_dev"}


def test_a_credit_group_of_ones_own_is_one_file(own):
    tree = plan_tree(Shape(steps=4, branch_steps=(0, 2), children=3))
    assert groups(tree, "mine:group").tolist() == groups(tree, "siblings").tolist()


def test_a_model_family_of_ones_own_is_one_file(own):
    config = load_config(**{"model.family": "mine:Family", "lora.targets": None})
    family, _ = describe_model(config.model)
    assert family.__module__ == "mine"
    assert {name.split(".lora_")[0].split(".", 2)[2] for name in lora_shapes(config.model, config.lora)} == {
        "attn.to_q"
    }
    assert fingerprint(config.model) != fingerprint(load_config().model)
    with pytest.raises(ValueError, match=r"^model\.family: mine:group given, which is not a subclass of"):
        describe_model(load_config(**{"model.family": "mine:group"}).model)


@pytest.mark.parametrize("key", ["sampler.kernel", "learner.objective", "credit.group", "model.family"])
@pytest.mark.parametrize("name", ["mine", "mine:nothing", "no_such_module:x", ":x", "mine:", 5])
def test_what_is_no_import_path_is_refused_in_one_line(key, name, own):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: {re.escape(repr(name))} given; [^\n]*$"):
        load_config(**{key: name})


def test_the_reference_of_the_api_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    places = [getattr(g2rpo_ray, name) for name in g2rpo_ray.__all__ if name != "Config"]  # settings.md has its keys
    assert all(f"`{name}`" in text for name in g2rpo_ray.__all__)
    assert all(re.search(rf"^::: g2rpo_ray\..*\b{place.__name__}$", text, re.MULTILINE) for place in places)


NOTEBOOK = """
import asyncio, json, sys

async def kernel():  # a notebook's cells run inside a loop
    names = {}
    for cell in json.load(open(sys.argv[1]))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "cell", "exec"), names)
    return names

names = asyncio.run(kernel())
before, after = (names[name].scores["warmth"].mean() for name in ("before", "after"))
assert after > before + 0.01, (before, after)
assert names["image"].size == (32, 32)
assert len(names["curve"].lines[0].get_xdata()) == 8
"""


def test_the_notebook_runs(tmp_path):
    env = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        preloaded.python("-c", NOTEBOOK, ROOT / "docs" / "quickstart.ipynb"),
        capture_output=True, text=True, timeout=400, check=False, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


PUSHED = """
import sys
from g2rpo_ray import read_run
print(read_run(sys.argv[1]).push_to_hub("me/mine"))
try:
    read_run(sys.argv[2]).push_to_hub("me/mine")
except ValueError as error:
    print(error)
"""


def a_run(folder, lora):
    """As much of a run's folder as a card needs."""
    config = load_config(
        name="mine",
        method="mix_grpo",
        **{"data.train_prompts": PROMPTS, "output": "/home/secret"},
        **{"data.heldout_prompts": "/home/secret/held.txt"},
    )
    (folder / "samples" / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 40}\n')
    for done in (0, 40):
        scores = {name: [[0.1 + done / 100], [0.2 + done / 100]] for name in config.all_rewards}
        record = {"prompts": PROMPTS[:2], "shown": 1, "scores": scores, "panel": {}}
        (folder / "samples" / f"{done:06d}.json").write_text(json.dumps(record))
        Image.new("RGB", (32, 32), "red").save(folder / "samples" / "pictures" / f"{done:06d}.png")
    if lora:
        (folder / "lora").mkdir()
        (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")


def test_an_adapter_is_pushed_with_a_card(tmp_path):
    """By the hub's own client, to a hub on this machine."""
    a_run(tmp_path / "mine", lora=True)
    a_run(tmp_path / "none", lora=False)
    with serve_hub({"uploads": tmp_path / "hub"}) as address:
        hub = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HOME": f"{tmp_path}"}
        done = subprocess.run(
            [sys.executable, "-c", PUSHED, tmp_path / "mine", tmp_path / "none"],
            capture_output=True, text=True, check=True, env={**os.environ, **hub}, timeout=120,
        )  # fmt: skip
    url, refused = done.stdout.splitlines()
    assert url.endswith("/me/mine/commit/0123456789abcdef0123456789abcdef01234567")
    assert refused == f"{tmp_path}/none/lora: there is no adapter; a run writes one at its first checkpoint"
    there = tmp_path / "hub" / "me" / "mine"
    assert sorted(file.name for file in there.iterdir()) == [
        "README.md", "pictures.png", "pytorch_lora_weights.safetensors", "settings.yaml"
    ]  # fmt: skip
    assert (there / "pytorch_lora_weights.safetensors").read_bytes() == b"weights"
    card, settings = (there / "README.md").read_text(), (there / "settings.yaml").read_text()
    for part in ("method `mix_grpo`, 40 iterations of 8 prompts", "preference (trained) | 0.1500 | 0.5500 | +0.4000",
                 "pictures.png", 'load_lora_weights("me/mine")', "| learning rate | 0.001 |"):  # fmt: skip
        assert part in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["lora", "reinforcement-learning", "g2rpo_ray", "mix_grpo"]
    assert yaml.safe_load(settings)["sampler"]["branch_schedule"] == "slide"
    assert yaml.safe_load(settings)["data"]["heldout_prompts"] == "held.txt"
    assert "secret" not in card + settings
