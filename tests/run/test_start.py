"""Where a run starts: its own checkpoint, the beginning, or a checkpoint of a run of another name."""

import json
import shutil
from fnmatch import fnmatchcase

import pytest

from g2rpo_ray.config import load_config
from g2rpo_ray.config.resume import NO_EFFECT, TRAINING, differences, settings
from g2rpo_ray.runs.checkpoint import find_checkpoint, finish_checkpoint, is_evaluated, new_checkpoint
from g2rpo_ray.runs.start import begin, find_start, first_iteration, is_own, read_origin
from g2rpo_ray.runs.storage import Folder
from tests.support.kills import killed


def settings_of(*overrides):
    return settings(load_config(None, overrides), ["a", "b"], ["c"], {})


def write_run(folder, iterations=4, *overrides):
    """A run as it is after so many iterations, with all checkpoints."""
    folder.write("config.yaml", b"learner: {}")
    for iteration in range(1, iterations + 1):
        checkpoint = new_checkpoint(folder, iteration)
        (checkpoint / "lora").write("weights", f"{iteration}".encode())
        made_with, budget = settings_of(*overrides), {"stride": iteration}
        finish_checkpoint(folder, iteration, checkpoint.digests(), 10, made_with, 1 / iteration, budget, evaluated=True)


def checkpoint_of(folder, iteration):
    return str(folder / "checkpoints" / f"{iteration:06d}")


def start(folder, resume, *overrides):
    """What the command does with the directory before anything is computed."""
    made_with = settings_of(*overrides)
    return begin(folder, find_start(folder, resume, made_with), made_with)


def content(folder):
    return {file: folder.read(file) for file in folder.files()}


@pytest.fixture(params=["path", "file://", "s3://", "memory://"])
def folder(request, tmp_path):
    bucket = request.getfixturevalue("bucket") if request.param == "s3://" else ""
    name = {
        "path": f"{tmp_path}/f",
        "file://": f"file://{tmp_path}/f",
        "s3://": bucket,
        "memory://": f"memory://{tmp_path}",
    }
    return Folder(name[request.param]) / request.node.originalname


def test_an_earlier_checkpoint_and_other_settings_start_another_run(folder):
    """It has the checkpoint, not judged yet, and says where it comes from; the first run stays as it is."""
    old, new = folder / "old", folder / "new"
    write_run(old)
    before, named = content(old), checkpoint_of(old, 2)
    made = start(new, named, "learner.lr=2e-4")
    assert content(old) == before
    assert (made.iteration, made.budget, made.settings["learner"]["lr"]) == (2, {"stride": 2}, 2e-4)
    assert str(made.folder) == checkpoint_of(new, 2) == str(find_checkpoint(new).folder)
    assert new.files() == [
        "checkpoints/000002/lora/weights", "checkpoints/000002/state.json", "checkpoints/LATEST", "lora/weights",
        "resumed_from.json",
    ]  # fmt: skip
    assert new.read("lora/weights") == b"2"
    assert not is_evaluated(new, 2)
    assert first_iteration(new) == 2
    lr = load_config().learner.lr
    assert read_origin(new) == {"checkpoint": named, "iteration": 2, "settings": {"learner.lr": [lr, 2e-4]}}
    # the same command resumes it, also when the first run has deleted the checkpoint; so does `auto`
    (old / "checkpoints").delete()
    for resume in (named, checkpoint_of(new, 2), "auto"):
        found = find_start(new, resume, settings_of("learner.lr=2e-4", "rollout.max_actors=7", "iterations=9"))
        assert str(found.folder) == checkpoint_of(new, 2)
        assert is_own(new, found)


@pytest.mark.parametrize(
    ("resume", "overrides", "words"),
    [
        ("auto", ["learner.lr=2e-4", "seed=1"], ["other settings: seed 0 -> 1, learner.lr ", "-> 0.0002; choose an"]),
        (4, ["learner.lr=2e-4"], ["other settings: learner.lr"]),
        (2, [], ["has its own checkpoints, up to 000004; choose another --name to start from "]),
        ("other", [], ["has its own checkpoints, up to 000004; choose another --name to start from "]),
        ("never", [], ["--resume never: ", "already has checkpoints; choose another --name"]),
        ("auto", ["iterations=3"], ["iterations: 3 given, but 4 are finished", "under another --name"]),
        ("s3:/x", [], ["--resume: 's3:/x' given; a URI has two slashes"]),
    ],
)  # fmt: skip
def test_what_another_run_needs_a_name_for_is_refused_in_a_line(resume, overrides, words, tmp_path):
    run, other = Folder(tmp_path / "run"), Folder(tmp_path / "other")
    for folder in (run, other):
        write_run(folder)
    before = content(run)
    named = checkpoint_of(other, 1) if resume == "other" else resume
    named = checkpoint_of(run, resume) if isinstance(resume, int) else named
    with pytest.raises(ValueError, match=r"^(--resume|iterations)") as refusal:
        start(run, named, *overrides)
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)
    assert content(run) == before


def test_a_directory_without_a_checkpoint_starts_as_it_is_told(tmp_path):
    """`never` forgets a start that was not finished; another checkpoint replaces it, and what a first run had begun."""
    old, run = Folder(tmp_path / "old"), Folder(tmp_path / "run")
    write_run(old)
    for name in ("metrics.jsonl", "audit.jsonl"):
        run.write(name, b'{"iteration": 0}\n')
    (run / "samples").write("000000.json", b"{}")
    (run / "embeddings").write("part", b"cache")
    run.write("resumed_from.json", json.dumps({"checkpoint": checkpoint_of(old, 3), "iteration": 3}).encode())
    assert find_start(run, "auto", settings_of()).iteration == 3
    assert start(run, checkpoint_of(old, 1)).iteration == first_iteration(run) == 1
    assert not {"metrics.jsonl", "audit.jsonl", "samples/000000.json"} & set(run.files())
    assert run.read("embeddings/part") == b"cache"
    (run / "checkpoints").delete()
    assert start(run, "never") is None
    assert read_origin(run) is None


def test_a_checkpoint_that_was_copied_from_its_run_is_a_start(folder, tmp_path):
    write_run(folder / "old")
    with (folder / "old" / "checkpoints" / "000003").reading() as path:
        shutil.copytree(path, tmp_path / "mine")
    assert start(folder / "new", str(tmp_path / "mine")).iteration == 3
    assert read_origin(folder / "new")["checkpoint"] == str(tmp_path / "mine")


@pytest.mark.parametrize("kind", ["path", "objects"])
def test_who_is_killed_anywhere_at_the_start_starts_again(kind, tmp_path):
    """Killed before its first change to the file system, before its second ...: the same command, and `auto`, go on."""
    old = Folder(tmp_path / "old")
    write_run(old, 2)
    (tmp_path / "template").mkdir()
    named = checkpoint_of(old, 1)
    begun = killings = 0
    for run in killed(tmp_path, kind, lambda run: start(run, named, "seed=1")):
        killings += 1
        copied, origin = find_checkpoint(run), read_origin(run)
        begun += copied is None and origin is not None
        assert origin is not None or not copied
        for resume in (["auto"] if origin else []) + [named]:
            assert start(run, resume, "seed=1").iteration == first_iteration(run) == 1
        assert find_checkpoint(run).settings["seed"] == 1
        with pytest.raises(ValueError, match="other settings: seed 1 -> 0"):
            start(run, named)
    assert 3 < begun < killings - 3


def test_what_may_change_freely_exists():
    """Each entry of the two lists is a setting, so that a new name cannot make an old one count, or not."""
    config = load_config(None, ["eval_rewards.judge={kind: jpeg_compressibility}"])
    keys = [key for key, *_ in leaves(settings(config, ["a"], ["b"], {}))]
    for pattern in (*NO_EFFECT, *TRAINING):
        assert any(fnmatchcase(key, pattern) for key in keys), pattern


def leaves(tree, above=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield (f"{above}{key}",)


@pytest.mark.parametrize(
    ("override", "counts"),
    [
        ("seed=1", True), ("sampler.steps=8", True), ("sampler.group_size=5", True),
        ("learner.lr=1", True), ("model.path=x", True), ("method=mix_grpo", True),
        ("rewards.preference.weight=3", True), ("rewards.other={kind: x}", True),
        ("rollout.micro_batch=3", True), ("rollout.resources={CPU: 2}", True),
        ("rollout.max_actors=9", False), ("rollout.completions.max_actors=1", False),
        ("rollout.resources={CPU: 0.5, node: 1}", False),
        ("learner.runtime_env={env_vars: {NCCL_DEBUG: INFO}}", False),
        ("rewards.preference.replicas=2", False), ("learner.max_restarts=1", False),
        ("iterations=7", False), ("tracking.tensorboard=false", False), ("output=x", False),
        ("checkpoint.keep=7", False), ("data.train_prompts=y", False),
    ],
)  # fmt: skip
def test_which_settings_count(override, counts):
    changed = differences(settings_of(), settings_of(override))
    assert bool(changed) == counts
    other = settings(load_config(), ["a", "x"], ["c"], {})
    assert list(differences(settings_of(), other)) == ["data.train_prompts"]  # the prompts count, not their file
