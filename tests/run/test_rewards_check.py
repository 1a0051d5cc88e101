"""`python -m g2rpo_ray.rewards`: what it finds of rewards that work, and of those that do not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from g2rpo_ray.actors.cluster import check_resources
from g2rpo_ray.commands import rewards as command
from g2rpo_ray.commands.rewards import PUBLISHED, Published, digest_of, main
from g2rpo_ray.config import RewardConfig, load_config
from g2rpo_ray.rewards.pictures import Picture, read_pictures, references
from g2rpo_ray.rewards.trial import probe
from g2rpo_ray.worlds.quickstart import PREFERENCE_ARCHITECTURE


def test_the_quickstart_s_rewards_are_fine(capsys):
    assert main(["quickstart", "--set", "eval_rewards.colour=null"]) == 0
    said = capsys.readouterr().out
    preference, shape = said.split("eval_rewards.shape: ")
    assert preference.startswith("rewards.preference: hpsv2 on cpu, float32\n    loaded in ")
    assert "6 images: 0.8657 to 0.9891, mean 0.9513, spread (std) 0.0430\n" in preference
    assert "prompts: +0.7365 with its own against another's, more for 6 of 6" in preference
    assert "6 images: 1.0000 to 1.0000" in shape
    assert said.count("repeated: the same bits") == 2
    assert said.count("published: no value is known") == 2


def test_what_is_wrong_is_one_line_each_and_the_others_are_tried(tmp_path, capsys):
    """A wrong checkpoint, scores that differ, an environment of its own."""
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "wrong.pt")
    small = str(PREFERENCE_ARCHITECTURE)
    rewards = {
        "wrong": {
            "kind": "hpsv2",
            "options": {"checkpoint": str(tmp_path / "wrong.pt"), "architecture": small},
            "resources": {"CPU": 1},
        },
        "drifts": {"kind": "tests.support.faulty:build_drifting"},
        "apart": {"kind": "hpsv2", "runtime_env": {"pip": ["hpsv2"]}},
    }
    sets = ["rewards.preference=null", f"rewards={json.dumps(rewards)}", "eval_rewards={}"]
    assert main(["quickstart", *(part for one in sets for part in ("--set", one))]) == 1
    wrong, drifts, *more, apart = capsys.readouterr().out.splitlines()
    assert wrong.startswith(f"rewards.wrong: not tried: checkpoint: {tmp_path}/wrong.pt")
    assert drifts == "rewards.drifts: tests.support.faulty:build_drifting on no device"
    assert "    repeated: WRONG, other bits, so runs are not reproducible" in more
    assert apart.startswith("rewards.apart: not tried: it has a runtime_env")


def test_a_group_is_compared_as_one_and_missing_scores_are_told():
    pictures = references(32, 32)
    found = probe(RewardConfig(kind="tests.support.faulty:build_rank", batch_size=2), pictures)
    assert sorted(found["scores"]) == [600, 601, 602, 603, 604, 605]
    assert found["group"]
    scores = np.array([1, np.nan, 3], np.float32)
    assert command._scale(scores, True) == (
        "3 images as one group: 1.0000 to 3.0000, mean 2.0000, spread (std) 1.0000, 1 missing"
    )
    assert command._scale(scores[1:2], False) == "WRONG: none of 1 images has a score"


def test_published_values_are_compared_for_the_published_checkpoint_alone(monkeypatch):
    picture = Picture("1", "a sea", np.zeros((4, 4, 3), np.uint8))
    assert len(PUBLISHED["imagereward"].values) == 4
    monkeypatch.setitem(PUBLISHED, "imagereward", Published("there", {digest_of(picture): 0.5}, 0.01))
    published, own = RewardConfig(kind="imagereward"), RewardConfig(kind="imagereward", options={"checkpoint": "my.pt"})
    equal, differs = np.array([0.505], np.float32), np.array([0.6], np.float32)
    assert command._published(published, [picture], equal).startswith("published: equal within 0.01: 1 images, by")
    assert "WRONG, they differ" in command._published(published, [picture], differs)
    assert "no value is known for this checkpoint" in command._published(own, [picture], differs)
    assert "values are known for other images: there" in command._published(published, references(32, 32)[:1], equal)


def test_an_environment_that_ray_does_not_take_is_told_before_the_start():
    for given, expected in (
        ("{pipp: [x]}", r"^rewards.preference.runtime_env.pipp: Ray has no such field; allowed are .*conda.*pip"),
        ("{pip: 3}", r"^rewards.preference.runtime_env: refused by Ray: "),
        ("{conda: x, pip: [y]}", r"^rewards.preference.runtime_env: refused by Ray: "),
    ):
        config = load_config(None, [f"rewards.preference.runtime_env={given}"])
        with pytest.raises(ValueError, match=expected):
            check_resources(config, {"CPU": 64})
    check_resources(load_config(None, ["rewards.preference.runtime_env={pip: [y]}"]), {"CPU": 64})
    for section in ("rollout", "learner"):
        with pytest.raises(ValueError, match=rf"^{section}.runtime_env.env_var: Ray has no such field"):
            check_resources(load_config(None, [f"{section}.runtime_env={{env_var: {{A: b}}}}"]), {"CPU": 64})


def test_pictures_of_a_folder_have_their_prompts_beside_them(tmp_path):
    for name in ("a_red_cat.png", "two.jpg"):
        Image.new("RGB", (8, 4), "red").save(tmp_path / name)
    Image.new("RGB", (8, 4), "red").save(tmp_path / "three.webp")
    (tmp_path / "two.txt").write_text("two dogs\n")
    (tmp_path / "three.jsonl").write_text('{"prompt": "three", "metadata": {"count": 3}}\n')
    found = [(picture.prompt, picture.metadata, picture.image.shape) for picture in read_pictures(tmp_path)]
    shape = (4, 8, 3)
    assert found == [("a red cat", {}, shape), ("three", {"count": 3}, shape), ("two dogs", {}, shape)]
    (tmp_path / "two.txt").write_text("two dogs\nthree dogs\n")
    with pytest.raises(ValueError, match=r"^IMAGES: .*two.txt has 2 prompts; give only that of two.jpg"):
        read_pictures(tmp_path)
    (tmp_path / "two.txt").unlink()
    (tmp_path / "three.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"^IMAGES: cannot read .*three.png"):
        read_pictures(tmp_path)
    with pytest.raises(ValueError, match=r"^IMAGES: .* has 0 images; give a folder with 1 to"):
        read_pictures(tmp_path / "none")


def test_references_are_the_same_every_time_and_have_text_where_there_is_room():
    first, again = references(256, 192), references(256, 192)
    assert [picture.prompt for picture in first][-1] == 'a white sign that says "Bakery"'
    assert all((a.image == b.image).all() for a, b in zip(first, again, strict=True))
    assert {picture.image.shape for picture in first} == {(256, 192, 3)}
    assert len(references(32, 32)) == 6
