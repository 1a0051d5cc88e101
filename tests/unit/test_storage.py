"""Where runs are kept: paths, an S3 server on this machine, fsspec; and a disk that is full."""

import re

import fsspec
import pytest

from g2rpo_ray.data import EmbeddingStore
from g2rpo_ray.runs.checkpoint import find_checkpoint, finish_checkpoint, new_checkpoint
from g2rpo_ray.runs.storage import Folder
from tests.support.embeddings import embedding


@pytest.fixture(params=["path", "file://", "s3://", "memory://"])
def folder(request, tmp_path, bucket):
    name = {"path": str(tmp_path / "f"), "file://": f"file://{tmp_path}/f", "s3://": bucket, "memory://": "memory://f"}
    return Folder(name[request.param]) / re.sub(r"\W", "", request.node.name)


def save(run, iteration, content=b"x", keep=2):
    target = new_checkpoint(run, iteration)
    with target.writing() as path:
        (path / "lora").mkdir()
        (path / "lora" / "weights").write_bytes(content)
        files = Folder(path).digests()
    finish_checkpoint(run, iteration, files, keep, {})


def test_checkpoints_are_whole_or_not_there_wherever_they_are(folder, caplog):
    assert find_checkpoint(folder) is None
    for iteration in (1, 2, 3):
        save(folder, iteration, str(iteration).encode())
    assert (folder / "checkpoints").names() == ["000002", "000003", "LATEST"]
    assert folder.read("lora/weights") == b"3"
    found = find_checkpoint(folder)
    with found.folder.reading() as path:
        assert (path / "lora" / "weights").read_bytes() == b"3"
    (found.folder / "lora").write("weights", b"damaged")
    assert find_checkpoint(folder).iteration == 2
    assert "lora/weights was changed" in caplog.text
    new_checkpoint(folder, 4).write("half", b"of it")
    assert find_checkpoint(folder).iteration == 2


def test_a_workspace_brings_what_is_there_and_keeps_what_is_new(folder):
    folder.write("metrics.jsonl", b"old")
    (folder / "samples").write("base.png", b"picture")
    save(folder, 1)
    with folder.workspace(without=("checkpoints", "lora")) as here:
        assert (here / "samples" / "base.png").read_bytes() == b"picture"
        assert (here / "checkpoints").exists() == (here == folder.path)
        (here / "metrics.jsonl").write_bytes(b"new")
        if folder.path is None:
            folder.take(here)
    assert folder.read("metrics.jsonl") == b"new"


def test_embeddings_are_kept_there_too(folder):
    EmbeddingStore(str(folder), "model").add([embedding("a"), embedding("b")])
    store = EmbeddingStore(str(folder), "model")
    assert store.missing(["a", "b", "c"]) == ["c"]
    assert [found.prompt for found in store.get(["b", "a"])] == ["b", "a"]


def test_a_key_that_leads_out_of_the_folder_is_refused():
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/good", b"")
    system.store["/bucket/../../evil"] = system.store["/bucket/good"]
    with pytest.raises(OSError, match="would be written outside"), Folder("memory://bucket").reading():
        pass
    del system.store["/bucket/../../evil"]


@pytest.mark.parametrize(
    "output, reason",
    [
        ("s3://user:hidden@bucket/runs", "output: cannot use bucket/runs: a URI with a password"),
        ("ftpx://host/runs", "output: cannot use ftpx://host/runs: .* neither a path nor a URI"),
        ("s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9&connect_timeout=1", "output: cannot use s3://"),
    ],
)
def test_storage_that_cannot_be_used_is_refused_in_one_line(output, reason, bucket, tmp_path, capsys):
    from g2rpo_ray.commands.train import main

    assert main(["--set", f"output={output}", "--check"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(reason, printed)
    assert "hidden" not in printed
