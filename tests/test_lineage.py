"""Going back, and going on with other settings: what was there is set aside whole, and nothing is mixed with it."""

import os
import shutil
import signal
import sys
from fnmatch import fnmatchcase

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from g2rpo_ray.config import load_config
from g2rpo_ray.config.resume import FREE, TRAINING, differences, judged_alike, settings
from g2rpo_ray.record.checkpoint import find_checkpoint, finish_checkpoint, new_checkpoint
from g2rpo_ray.record.lineage import begin_lineage, find_beginning, finish_beginning, judged_since, read_changes
from g2rpo_ray.record.storage import Folder
from g2rpo_ray.record.tracking import parse_lines


def settings_of(*overrides):
    return settings(load_config(None, overrides), ["a", "b"], ["c"], {})


def write_run(folder, iterations=4, lr="1e-4"):
    """A run as it is after so many iterations, with all checkpoints; the base was judged, and the last policy."""
    made_with = settings_of(f"learner.lr={lr}")
    folder.write("config.yaml", f"learner: {{lr: {lr}}}".encode())
    folder.write(
        "metrics.jsonl", "".join(f'{{"iteration": {i}, "lr": {lr}}}\n' for i in range(iterations + 1)).encode()
    )
    for iteration in (0, iterations):
        (folder / "samples").write(f"{iteration:06d}.json", b'{"scores": {}}')
    (folder / "samples" / "pictures").write("000000.png", b"picture")
    (folder / "embeddings").write("part", b"cache")
    for iteration in range(1, iterations + 1):
        checkpoint = new_checkpoint(folder, iteration)
        (checkpoint / "lora").write("weights", f"{iteration} {lr}".encode())
        finish_checkpoint(folder, iteration, checkpoint.digests(), 10, made_with, score=1 / iteration)


def iterations_of(folder):
    return [line["iteration"] for line in parse_lines(folder.read("metrics.jsonl").decode())]


def whole(folder):
    """The state of a lineage, every part of which must agree."""
    latest = find_checkpoint(folder)
    assert folder.read("checkpoints/LATEST").decode().strip() == latest.folder.name
    assert folder.read("lora/weights") == (latest.folder / "lora").read("weights")
    return latest.iteration, iterations_of(folder), folder.read("lora/weights").decode()


def go_back(folder, to, *overrides):
    beginning = find_beginning(folder, str(folder / "checkpoints" / f"{to:06d}"), settings_of(*overrides))
    return begin_lineage(folder, beginning, "new: config")


@pytest.fixture(params=["path", "file://", "s3://", "memory://"])
def folder(request, tmp_path):
    bucket = request.getfixturevalue("bucket") if request.param == "s3://" else ""
    name = {
        "path": f"{tmp_path}/f",
        "file://": f"file://{tmp_path}/f",
        "s3://": bucket,
        "memory://": "memory://lineage",
    }
    return Folder(name[request.param]) / request.node.originalname


def test_going_back_sets_aside_what_came_after(folder):
    write_run(folder)
    checkpoint = go_back(folder, 2, "learner.lr=1e-4")
    assert whole(folder) == (2, [0, 1, 2], "2 1e-4")
    assert str(checkpoint.folder) == str(folder / "checkpoints" / "000002")
    assert [name for name in (folder / "checkpoints").names() if name.isdigit()] == ["000001", "000002"]
    assert folder.read("checkpoints/BEST") == b"000001\n"
    assert folder.read("config.yaml") == b"new: config"
    assert folder.read("embeddings/part") == b"cache"
    assert not folder.exists("samples/000004.json")
    assert (folder / "samples").read("pictures/000000.png") == b"picture"
    aside = folder / "set_aside" / "1"
    assert whole(aside) == (4, [0, 1, 2, 3, 4], "4 1e-4")
    assert aside.exists("samples/000004.json")
    assert aside.read("config.yaml") == b"learner: {lr: 1e-4}"
    (line,) = read_changes(folder)
    assert (line["iteration"], line["settings"], line["judged_alike"]) == (2, {}, True)
    assert line["set_aside"] == "set_aside/1"
    # the same command again goes on with the lineage that it began; so does `auto`
    for resume in (str(folder / "checkpoints" / "000002"), "auto"):
        assert not find_beginning(folder, resume, settings_of("learner.lr=1e-4")).anew
    # and what was set aside can be gone back to
    old = find_beginning(folder, str(aside / "checkpoints" / "000004"), settings_of("learner.lr=1e-4"))
    begin_lineage(folder, old, "old: config")
    assert whole(folder) == (4, [0, 1, 2, 3, 4], "4 1e-4")
    assert whole(folder / "set_aside" / "2") == (2, [0, 1, 2], "2 1e-4")
    assert [name for name in (folder / "set_aside").names() if (folder / "set_aside" / name).files()] == ["1", "2"]


def test_starting_again_sets_everything_aside_but_what_is_no_lineage_s(folder):
    write_run(folder)
    beginning = find_beginning(folder, "never", settings_of())
    assert begin_lineage(folder, beginning, "new: config") is None
    assert find_checkpoint(folder) is None
    assert folder.read("embeddings/part") == b"cache"
    assert not folder.exists("metrics.jsonl")
    assert whole(folder / "set_aside" / "1")[0] == 4
    assert not find_beginning(folder, "never", settings_of()).anew  # nothing is there


def test_other_settings_are_named_and_known_from_then_on(folder):
    write_run(folder)
    found = find_beginning(folder, "auto", settings_of("learner.lr=2e-4", "rollout.max_actors=7", "iterations=9"))
    assert (found.anew, found.changed) == (True, {"learner.lr": (1e-4, 2e-4)})
    begin_lineage(folder, found, "new: config")
    assert read_changes(folder)[-1]["settings"] == {"learner.lr": [1e-4, 2e-4]}
    assert judged_since(read_changes(folder)) == 0  # the policy is another, its judges are not
    assert not find_beginning(folder, "auto", settings_of("learner.lr=2e-4")).anew
    # before anything came of it, it can be taken back, and is not written down then
    back = find_beginning(folder, "auto", settings_of("learner.lr=1e-4"))
    assert (back.anew, back.changed) == (True, {})
    begin_lineage(folder, back, "old: config")
    assert [line["settings"] for line in read_changes(folder)] == [{}]


def test_unlike_judges_are_not_compared(folder):
    """The policy is judged again where judges change, and what they said before is set aside."""
    write_run(folder)
    found = find_beginning(folder, "auto", settings_of("learner.lr=1e-4", "evaluation.seeds=9"))
    begin_lineage(folder, found, "new: config")
    assert judged_since(read_changes(folder)) == 4
    assert (folder / "samples").files() == []
    assert (folder / "checkpoints").names() == ["000004", "LATEST"]  # none is the best by unlike judges
    assert iterations_of(folder) == [0, 1, 2, 3, 4]
    assert (folder / "set_aside" / "1" / "samples").files() == ["000000.json", "000004.json", "pictures/000000.png"]


def test_a_checkpoint_that_was_copied_from_its_run_is_a_start(folder, tmp_path):
    write_run(folder)
    with (folder / "checkpoints" / "000003").reading() as path:
        shutil.copytree(path, tmp_path / "mine")
    other = folder.parent / "other"
    beginning = find_beginning(other, str(tmp_path / "mine"), settings_of("learner.lr=1e-4"))
    begin_lineage(other, beginning, "new: config")
    assert find_checkpoint(other).iteration == 3
    assert judged_since(read_changes(other)) == 3
    assert read_changes(other)[-1]["set_aside"] is None
    other.delete()


@pytest.mark.parametrize(("kind", "stride"), [("path", 2), ("objects", 7)])
def test_who_is_killed_anywhere_on_the_way_back_loses_and_mixes_nothing(kind, stride, tmp_path):
    """Killed before its first change to the file system, before its second ...; then the next one finishes it."""
    fsspec.register_implementation("objects", Objects, clobber=True)
    write_run(Folder(tmp_path / "template"), 2)
    number, ended, undone = 0, False, 0
    while not ended:
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "template", place)
        folder = Folder(place if kind == "path" else f"objects://{place}")
        pid = os.fork()
        if not pid:
            try:
                die_before_change(number)
                go_back(folder, 1, "learner.lr=2e-4")
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitpid(pid, 0)[1] == 0
        finish_beginning(folder)
        if read_changes(folder):
            assert whole(folder) == (1, [0, 1], "1 1e-4")
            assert whole(folder / "set_aside" / "1") == (2, [0, 1, 2], "2 1e-4")
            assert (folder / "set_aside" / "1").exists("samples/000002.json")
        else:  # it was killed before the intent was written
            assert whole(folder) == (2, [0, 1, 2], "2 1e-4")
            undone += 1
        number += stride
    assert 3 < undone < number / stride - 3
    print(kind, number, undone)


class Objects(LocalFileSystem):
    """On this disk, but as an object store does it: no folders to make, and a move is a copy and a deletion."""

    protocol = "objects"

    def __init__(self):
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("objects://"))

    def mv(self, path1, path2, **_):
        self.cp_file(path1, path2)
        self.rm_file(path1)


def die_before_change(number):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "shutil.rmtree")
        if changes or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def test_what_may_change_freely_exists():
    """Each entry of the two lists is a setting, so that a new name cannot make an old one count, or not."""
    config = load_config(None, ["eval_rewards.judge={kind: jpeg_compressibility}"])
    keys = [key for key, *_ in leaves(settings(config, ["a"], ["b"], {}))]
    for pattern in (*FREE, *TRAINING):
        assert any(fnmatchcase(key, pattern) for key in keys), pattern


def leaves(tree, above=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{key}.")
        else:
            yield (f"{above}{key}",)


@pytest.mark.parametrize(
    ("override", "counts", "alike"),
    [
        ("seed=1", True, False), ("sampler.steps=8", True, False), ("sampler.group_size=5", True, True),
        ("learner.lr=1", True, True), ("model.path=x", True, False), ("method=mix_grpo", True, True),
        ("rewards.preference.weight=3", True, True), ("rewards.other={kind: x}", True, False),
        ("rollout.micro_batch=3", True, False), ("rollout.threads=2", True, False),
        ("rollout.max_actors=9", False, True), ("rollout.resources={CPU: 2}", False, True),
        ("rewards.preference.replicas=2", False, True), ("learner.max_restarts=1", False, True),
        ("iterations=7", False, True), ("tracking.tensorboard=false", False, True), ("output=x", False, True),
        ("checkpoint.keep=7", False, True), ("data.train_prompts=y", False, True),
    ],
)  # fmt: skip
def test_which_settings_count(override, counts, alike):
    changed = differences(settings_of(), settings_of(override))
    assert bool(changed) == counts
    assert judged_alike(changed) == alike
    other = settings(load_config(), ["a", "x"], ["c"], {})
    assert list(differences(settings_of(), other)) == ["data.train_prompts"]  # the prompts count, not their file
