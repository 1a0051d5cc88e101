"""`g2rpo_ray.commands.scale` and the file by which it finds a run's private cluster."""

import pytest

from g2rpo_ray.commands.scale import main


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rollout", "100000000000"], ["--rollout: 100000000000 given", "from 1 to 4096"]),
        (["--rollout", "0"], ["--rollout: 0 given", "from 1 to 4096"]),
        (["--reward", "preference=99999"], ["--reward preference: 99999 given", "from 1 to 4096"]),
        (["--reward", "preference=²"], ["--reward: 'preference=²' given", "NAME=N"]),
        ([], ["--rollout N, --completions N or --reward NAME=N"]),
        (["--completions", "0"], ["--completions: 0 given", "from 1 to 4096"]),
        (["--rollout", "2", "--name", "killed"], ["no run 'killed' is running", "left from a killed one"]),
        (["--rollout", "2", "--name", "damaged"], ["--output: cannot read ", "ray.json"]),
    ],
)
def test_a_size_or_a_run_that_cannot_be_is_one_line(arguments, parts, tmp_path, capsys):
    for name, text in (("killed", '{"address": "127.0.0.1:1"}'), ("damaged", "{half")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ray.json").write_text(text)
    assert main(["--output", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    for part in parts:
        assert part in printed
