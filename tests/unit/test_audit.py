"""The audit of a run: what its digests tell apart, and what `g2rpo verify` says where nothing can be replayed."""

import numpy as np

from g2rpo_ray.commands.verify import main
from g2rpo_ray.config import dump_config, load_config
from g2rpo_ray.runs.audit import digests
from g2rpo_ray.runs.tracking import to_json
from g2rpo_ray.types import Branches, Trunk

PIXELS = np.zeros((2, 4, 4, 3), np.uint8)


def branches(latent: float = 0.0, log_prob: float = np.nan) -> Branches:
    latents = np.full((1, 2, 3), latent, np.float32)
    return Branches(np.array([4]), latents, np.array([0]), np.array([log_prob], np.float32))


def test_a_digest_is_of_shape_dtype_and_all_bits():
    sound = digests(branches(), PIXELS)
    assert sound.keys() == {"latents", "log_prob", "images"}
    assert sound == digests(branches(), PIXELS.copy("F"))  # however they lie in memory
    for part, other in {
        "latents": digests(branches(latent=-0.0), PIXELS),
        "log_prob": digests(branches(log_prob=0.0), PIXELS),
        "images": digests(branches(), PIXELS.reshape(2, 4, 2, 6)),
    }.items():
        assert [name for name in sound if sound[name] != other[name]] == [part]
    trunk = Trunk(np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32))
    assert digests(trunk, PIXELS).keys() == {"latents", "velocities", "images"}
    assert digests(None, PIXELS).keys() == {"images"}


def test_what_can_not_be_replayed_is_a_line(tmp_path, capsys):
    line = {"iteration": 2, "weights": "", "units": {}, "scores": {}, "lora": ""}

    def refused(*arguments: str) -> str:
        assert main([str(tmp_path), *arguments]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        return said

    assert "has no audit.jsonl: it is no run's folder, or of a version that did not write it yet" in refused()
    (tmp_path / "audit.jsonl").write_text(to_json(line) + "\n" + '{"iteration": 3}\n')
    assert "--iteration: 3 given; " in refused("--iteration", "3")
    assert "audit.jsonl has iterations 2 to 2" in refused("--iteration", "0")
    assert "config.yaml" in refused()
    settings = ["rewards.preference.kind=jpeg_compressibility", "rewards.preference.options={}", "learner.ranks=2"]
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, [*settings, "learner.resources={CPU: 0}"])))
    assert "learner.ranks: the run had 2" in refused()
    assert "checkpoints of the run: none" in refused()
