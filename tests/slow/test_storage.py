"""Lost machines and full disks: runs resume from storage."""

import shutil

import pytest

from g2rpo_ray.runs.checkpoint import find_checkpoint
from g2rpo_ray.runs.storage import Folder
from tests.support.runs import (
    fill,
    kill_all,
    lora,
    run,
    same_lora,
    small_disk,
    start,
    verified,
    wait_for,
    wait_for_iteration,
)


@pytest.mark.cluster
def test_when_all_machines_are_gone_a_new_cluster_goes_on_from_the_bucket(bits, bucket, tmp_path):
    """Driver, cluster and every local file are lost; the same command anywhere ends with the same bits."""
    process = start(bucket, "cloud", data__embeddings="null")
    wait_for(process, lambda: (Folder(bucket) / "cloud" / "checkpoints").exists("LATEST"))
    kill_all(process)
    run(bucket, "cloud", data__embeddings="null")
    kept = Folder(bucket) / "cloud"
    assert {"config.yaml", "metrics.jsonl", "run.log", "samples", "summary.json"} <= set(kept.names())
    with (kept / "lora").reading() as path:
        shutil.copytree(path, tmp_path / "cloud" / "lora")
    same_lora(lora(tmp_path, "cloud"), bits)
    assert verified((kept, 3)) == [(0, "iteration 3: the same\n")]
    everything = b"".join(kept.read(name) for name in kept.digests())
    assert b"s3cr3t" not in everything


@pytest.mark.cluster
def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint_intact(bits, tmp_path):
    with small_disk(tmp_path, "24m") as disk:
        process = start(disk, "full")
        wait_for_iteration(process, disk, "full", 1)
        wait_for(process, lambda: (disk / "full" / "checkpoints" / "LATEST").exists())
        fill(disk / "filler")
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 1, printed
        assert "No space left on device" in printed.splitlines()[-1]
        assert "Traceback" not in printed
        (disk / "filler").unlink()
        assert find_checkpoint(Folder(disk / "full")).iteration >= 1
        run(disk, "full")
        same_lora(lora(disk, "full"), bits)
