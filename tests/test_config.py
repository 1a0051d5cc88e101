"""Settings: what is read, what is refused, and that the refusal names the key, the value and what is allowed."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from g2rpo_ray.config import dump_config, load_config
from g2rpo_ray.launch.preflight import check_files


def test_the_default_is_the_embedded_quickstart_and_its_file_in_configs_says_the_same():
    assert load_config() == load_config("configs/quickstart.yaml")
    assert load_config().model.path == "embedded:pipeline"


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_passes_the_check_of_its_files(path):
    config = load_config(str(path))
    unchecked = check_files(config, None)
    assert all("hub" in line for line in unchecked)
    if path.stem != "quickstart":
        assert config.name == path.stem


def test_the_paper_s_rows_differ_in_rewards_and_granularities_alone():
    base = load_config("configs/flux_hps.yaml").model_dump()
    strides = {}
    for path in Path("configs").glob("flux_hps*.yaml"):
        config = load_config(str(path)).model_dump()
        strides[path.stem] = (tuple(config["rewards"]), config["sampler"]["strides"])
        for section in ("model", "lora", "learner", "data", "evaluation"):
            assert config[section] == base[section]
    both = ("hpsv2", "clip")
    assert strides == {
        f"flux_hps{clip}{row}": (both if clip else ("hpsv2",), granularities)
        for clip in ("", "_clip")
        for row, granularities in {"": (1, 2, 3), "_1": (1,), "_1_2": (1, 2), "_1_3": (1, 3)}.items()
    }


def test_overrides_are_yaml_values_at_dotted_keys():
    config = load_config(None, ["sampler.strides=[1, 3]", "rewards.preference.weight=0.5", "name=other"])
    assert config.sampler.strides == (1, 3)
    assert config.rewards["preference"].weight == 0.5
    assert config.name == "other"


def test_a_file_extends_another_and_gives_only_what_differs(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: embedded:config.yaml\nsampler: {eta: 0.5}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nsampler: {group_size: 4}\n")
    config = load_config(str(tmp_path / "child.yaml"))
    assert (config.sampler.eta, config.sampler.group_size) == (0.5, 4)
    assert config.sampler.steps == load_config().sampler.steps


def test_a_dumped_configuration_reads_back_the_same(tmp_path):
    config = load_config(None, ["sampler.shift=dynamic"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_nothing_changes_after_loading():
    config = load_config()
    with pytest.raises(ValidationError):
        config.sampler.steps = 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sampler.stpes=3", ["sampler.stpes: unknown key", "did you mean steps?"]),
        ("nonsense=3", ["nonsense: unknown key", "allowed are name, output"]),
        ("rewards.preference.wieght=3", ["rewards.preference.wieght", "did you mean weight?"]),
        ("sampler.steps=many", ["sampler.steps: 'many' given", "integer"]),
        ("sampler.steps=0", ["sampler.steps: 0 given", "greater than 0"]),
        ("sampler.strides=[0, 1]", ["sampler.strides: [0, 1] given", "from 1 up"]),
        ("sampler.branch_steps=[8, 10]", ["sampler.branch_steps: [8, 10] given", "0..9", "steps=10"]),
        ("sampler.branch_steps=[2, 1]", ["sampler.branch_steps", "ascending"]),
        ("sampler.kernel=sde", ["sampler.kernel: 'sde' given", "'flow', 'dance' or 'cps'"]),
        ("sampler.shift=0.0", ["sampler.shift", "positive"]),
        ("name=../elsewhere", ["name: '../elsewhere' given"]),
        ("model.path.x=1", ["model.path.x", "path is not a section"]),
        ("learner.zero_stage=4", ["learner.zero_stage: 4 given", "1, 2 or 3"]),
        ("just words", ["--set: 'just words' given", "section.key=value"]),
        ("seed=[", ["--set seed", "not a YAML value"]),
    ],
)
def test_a_refusal_is_one_line_that_names_key_value_and_what_is_allowed(override, parts):
    with pytest.raises(ValueError, match=r".") as refusal:
        load_config(None, [override])
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read"),
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("extends: 3\n", "must be the name of a file"),
        ("name: x\n", "model: missing"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, part):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=part) as refusal:
        load_config(str(path))
    assert "\n" not in str(refusal.value)


def test_a_reward_has_one_role():
    override = "eval_rewards.preference={kind: colour_accuracy}"
    with pytest.raises(ValueError, match="eval_rewards: preference is in `rewards` too"):
        load_config(None, [override])


def test_null_takes_a_reward_out():
    config = load_config(None, ["eval_rewards.shape=null"])
    assert list(config.eval_rewards) == ["colour"]
    with pytest.raises(ValueError, match="rewards"):
        load_config(None, ["rewards.preference=null"])
