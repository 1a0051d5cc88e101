"""Settings: what is read, what is refused, and that the refusal names the key, the value and what is allowed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from g2rpo_ray import methods
from g2rpo_ray.algo.tree import plan_tree
from g2rpo_ray.config import Config, LearnerConfig, RewardConfig, SamplerConfig, dump_config, load_config
from g2rpo_ray.config.resume import differences, settings
from g2rpo_ray.config.schema import CreditConfig, EvaluationConfig
from g2rpo_ray.config.section import Section
from g2rpo_ray.config.text import read_yaml
from g2rpo_ray.methods import method_names, preset
from g2rpo_ray.preflight import check_files
from g2rpo_ray.study.plan import Plan
from g2rpo_ray.study.schema import read_study


def test_the_default_is_the_embedded_quickstart_and_its_file_in_configs_says_the_same():
    assert load_config() == load_config("configs/quickstart.yaml")
    assert load_config().model.path == "embedded:pipeline"


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_passes_the_check_of_its_files(path):
    config = load_config(str(path))
    unchecked = check_files(config, None)
    assert all("hub" in line or "is contacted at the start" in line for line in unchecked)
    if path.stem != "quickstart":
        assert config.name == path.stem


def test_the_paper_s_rows_differ_in_rewards_and_granularities_alone():
    plan, base = Plan(*read_study("flux_table")), load_config("configs/flux_hps.yaml").model_dump()
    strides = {}
    for table, has in plan.study.tables.items():
        for variant in (name for name in has.variants if name.startswith("G²RPO")):
            config = plan.config(table, variant).model_dump()
            strides[table, variant] = (tuple(sorted(config["rewards"])), config["sampler"]["strides"])
            for section in ("method", "model", "lora", "credit"):
                assert config[section] == base[section]
            assert config["sampler"] | {"strides": base["sampler"]["strides"]} == base["sampler"]
            assert config["learner"] | {"ranks": base["learner"]["ranks"]} == base["learner"]
    assert strides == {
        (table, f"G²RPO {{{','.join(map(str, row))}}}"): (rewards, row)
        for table, rewards in {"hps": ("hpsv2",), "hps_clip": ("clip", "hpsv2")}.items()
        for row in ((1,), (1, 2), (1, 3), (1, 2, 3))
    }


def test_the_paper_s_setting_is_in_the_configuration_of_its_name():
    """Its own numbers, as the paper has them; the learning rate is a LoRA's."""
    config = load_config("configs/flux_hps.yaml")
    sampler, learner = config.sampler, config.learner
    assert (sampler.steps, sampler.branch_steps, sampler.group_size) == (16, tuple(range(8)), 12)
    assert (sampler.kernel, sampler.eta, sampler.strides, sampler.layout) == ("flow", 0.7, (1, 2, 3), "paper")
    assert (sampler.shift, sampler.roots, sampler.stochastic_edges, config.evaluation.anchors) == (3, 1, 1, True)
    assert (config.credit.group, config.credit.spread, config.credit.clip) == ("siblings", "group", 5)
    assert (learner.objective, learner.clip_range, learner.kl_beta, learner.schedule) == ("clip", 1e-4, 0, "per_step")
    assert (learner.weight_decay, learner.grad_clip, learner.betas) == (1e-4, 1, (0.9, 0.999))
    assert (config.data.prompts_per_iteration, config.iterations, config.model.height) == (16, 300, 720)


def static_shift_twice(steps):
    """The grid of SD3.5's pipeline, by hand: the ends of its shifted table, shifted again."""

    def shifted(t):
        return 3 * t / (1 + 2 * t)

    return [shifted(1 + (shifted(0.001) - 1) * i / (steps - 1)) for i in range(steps)] + [0.0]


def test_the_kl_of_sd3_flow_grpo_weighs_what_the_released_code_s_does():
    """The released code has .01, and divides by 2 g² where this KL divides by 2 g² |Δσ|."""
    config = load_config("configs/sd3_flow_grpo.yaml")
    grid = static_shift_twice(config.sampler.steps)
    trained = [i for i in range(config.sampler.steps) if i not in config.sampler.untrained]
    stronger = [1 / (grid[i] - grid[i + 1]) for i in trained]
    assert (min(stronger), max(stronger)) == pytest.approx((3.716, 25.08), rel=1e-3)
    assert config.learner.kl_beta == 0.001
    assert config.learner.kl_beta * sum(stronger) / len(stronger) == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize("name", ["sd3_flow_grpo", "sd3_g2rpo", "sd3_diffusion_nft", "sd3_awm"])
def test_sd3_is_sampled_on_the_pipeline_s_own_grid_as_in_the_released_code(name):
    assert load_config(f"configs/{name}.yaml").sampler.shift == "pipeline"


@pytest.mark.parametrize(("steps", "trained"), [(1, 1), (10, 9), (14, 12), (20, 18), (28, 25), (40, 36)])
def test_awm_trains_the_released_code_s_part_of_the_schedule(steps, trained):
    assert load_config(None, ["method=awm", f"sampler.steps={steps}"]).sampler.untrained == (*range(trained, steps),)


def test_e_grpo_walks_to_the_image_as_the_released_code_does():
    sampler = load_config(None, ["method=e_grpo", "sampler.steps=16"]).sampler
    tree = plan_tree(sampler.shape((1,)))  # an edge from 1 to 3
    node, path = int(tree.leaf[1]), []
    while node != tree.target[0]:
        path.append(int(tree.index[node]))
        node = int(tree.parent[node])
    assert [3, *reversed(path)] == [3, 4, 6, 8, 10, 12, 14, 16]


def test_overrides_are_yaml_values_at_dotted_keys():
    config = load_config(None, ["sampler.strides=[1, 3]", "rewards.preference.weight=0.5", "name=other"])
    assert config.sampler.strides == (1, 3)
    assert config.rewards["preference"].weight == 0.5
    assert config.name == "other"


def devices(*overrides):
    config = load_config(None, ["eval_rewards={}", *overrides])
    return [
        config.rollout.device,
        config.learner.device,
        config.data.encoder_device,
        config.rewards["preference"].device,
    ]


KEYS = ("rollout.resources", "learner.resources", "data.encoder_resources", "rewards.preference.resources")


def test_a_device_is_the_gpu_that_is_reserved_else_the_cpu():
    assert devices() == ["cpu"] * 4  # the quickstart reserves none
    assert devices(*(f"{key}={{GPU: 1}}" for key in KEYS)) == ["cuda"] * 4
    assert devices(*(f"{key}={{GPU: 1}}" for key in KEYS[:2])) == ["cuda", "cuda", "cpu", "cpu"]
    assert load_config("flux_hps").rewards["hpsv2"].device == "cuda"
    assert RewardConfig(kind="hpsv2").device == "cuda"  # by default a server reserves a GPU, and uses it
    assert RewardConfig(kind="hpsv2", resources={"CPU": 1}).device == "cpu"


def test_a_device_that_changes_with_the_resources_counts_when_a_run_is_resumed():
    moved = load_config(None, ["rollout.resources={GPU: 1}"])
    before, now = (settings(config, ["a"], ["b"], {}) for config in (load_config(), moved))
    assert differences(before, now) == {"rollout.device": ("cpu", "cuda")}


@pytest.mark.parametrize(("cpus", "threads"), [(0, 1), (0.5, 1), (1, 1), (3, 3), (100_000, 256)])
def test_threads_are_the_cpus_that_are_reserved_and_count_when_a_run_is_resumed(cpus, threads):
    sections = ("rollout", "learner", "rewards.preference")
    config = load_config(None, [f"{section}.resources={{CPU: {cpus}}}" for section in sections])
    assert [config.rollout.threads, config.learner.threads, config.rewards["preference"].threads] == [threads] * 3
    before, now = (settings(one, ["a"], ["b"], {}) for one in (load_config(), config))
    changed = {f"{section}.threads": (1, threads) for section in sections} if threads > 1 else {}
    assert differences(before, now) == changed
    one, many = (load_config(None, [f"rollout.resources={{GPU: 1, CPU: {number}}}"]) for number in (1, 9))
    assert differences(settings(one, ["a"], ["b"], {}), settings(many, ["a"], ["b"], {})) == {}


@pytest.mark.parametrize("key", ["learner.threads", "data.encoder_device", "rewards.preference.device"])
def test_a_key_that_was_removed_tells_what_to_do(key):
    with pytest.raises(ValueError, match=rf"^{key}: unknown key; remove it: GPU and CPU in the resources"):
        load_config(None, [f"{key}=auto"])


def test_gpus_that_would_not_be_used_or_would_be_shared_are_refused():
    for key in KEYS[:3]:
        with pytest.raises(ValueError, match=rf"^{key}.GPU: 2 given; may be at most 1"):
            load_config(None, [f"{key}={{GPU: 2}}"])
    halves = ["learner.ranks=2", "learner.resources={GPU: 0.5}"]
    with pytest.raises(ValueError, match="^learner.resources.GPU: 0.5 given; must be 1 with learner.ranks=2"):
        load_config(None, halves)
    assert load_config(None, halves[1:]).learner.device == "cuda"
    no_use = load_config(None, ["eval_rewards={jpeg: {kind: jpeg_compressibility}}"])
    with pytest.raises(ValueError, match="^eval_rewards.jpeg.resources: GPU: 1 .* runs on the CPU only; give"):
        check_files(no_use, None)
    elsewhere = load_config(None, ["rewards.preference.options.device=cuda"])
    with pytest.raises(ValueError, match="^rewards.preference.options.device: given; .*rewards.preference.resources"):
        check_files(elsewhere, None)


@pytest.mark.parametrize("backend", ["_flash_3", "sage", "_sage_qk_int8_pv_fp16_triton"])
def test_attention_without_a_backward_pass_is_for_rollout_alone(backend):
    for deterministic in ("true", "false"):
        with pytest.raises(ValueError, match=rf"^model.attention_backend: {backend} given, which has no backward pass"):
            load_config(None, [f"model.attention_backend={backend}", f"deterministic={deterministic}"])
    config = load_config(None, [f"rollout.attention_backend={backend}", "model.attention_backend=native"])
    assert (config.rollout_model.attention_backend, config.model.attention_backend) == (backend, "native")
    assert load_config(None, ["model.attention_backend=native"]).rollout_model.attention_backend == "native"


def test_attention_that_is_not_deterministic_is_for_a_run_that_does_not_promise_it():
    with pytest.raises(
        ValueError, match="^model.attention_backend: flash given; .* can use native, .* deterministic to false$"
    ):
        load_config(None, ["model.attention_backend=flash"])
    assert load_config(None, ["model.attention_backend=flash", "deterministic=false"]).model.attention_backend
    assert load_config(None, ["model.attention_backend=_native_cudnn"]).deterministic


def test_a_mapping_in_an_override_takes_the_place_of_the_file_s_and_one_in_a_file_is_merged(tmp_path):
    assert list(load_config().eval_rewards) == ["colour", "shape"]
    assert load_config(None, ["eval_rewards={}"]).eval_rewards == {}
    judge = "{kind: jpeg_compressibility}"
    assert list(load_config(None, [f"eval_rewards={{judge: {judge}}}"]).eval_rewards) == ["judge"]
    config = load_config(
        None, ["rewards.preference.kind=tests.support.faulty:build", "rewards.preference.options={errors: 1}"]
    )
    assert config.rewards["preference"].options == {"errors": 1}
    (tmp_path / "more.yaml").write_text(f"extends: embedded:config.yaml\neval_rewards: {{judge: {judge}}}\n")
    config = load_config(str(tmp_path / "more.yaml"))
    assert list(config.eval_rewards) == ["colour", "shape", "judge"]
    shape = load_config(None, ["sampler={steps: 10, eta: 0.5}"]).sampler  # the rest is the preset's, not the file's
    assert (shape.eta, shape.group_size, shape.strides) == (0.5, 12, (1, 2, 3))


def test_a_file_extends_a_packaged_configuration_by_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: flux_hps\nseed: 7\n")
    assert load_config(tmp_path / "mine.yaml") == load_config("flux_hps", seed=7)


def test_a_file_extends_another_and_gives_only_what_differs(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: embedded:config.yaml\nsampler: {eta: 0.5}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nsampler: {group_size: 4}\n")
    config = load_config(str(tmp_path / "child.yaml"))
    assert (config.sampler.eta, config.sampler.group_size) == (0.5, 4)
    assert config.sampler.steps == load_config().sampler.steps


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampler.shift=dynamic"],
        ["credit.granularity_weights=[1, 0.5]", "learner.objective=guard"],
        ["sampler.trained_share=0.3", "method=branch_grpo"],  # where it is in the line does not matter
        *([f"method={name}"] for name in method_names()),
    ],
    ids=str,
)
def test_a_dumped_configuration_reads_back_the_same(tmp_path, overrides):
    config = load_config(None, overrides)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    again = load_config(str(tmp_path / "config.yaml"), [f"method={config.method}"])
    assert again == config  # naming it again changes nothing


def test_nothing_changes_after_loading():
    config = load_config()
    with pytest.raises(ValidationError):
        config.sampler.steps = 3


BOMB = "[&a0 [x], " + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)) + "]"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sampler.stpes=3", ["sampler.stpes: unknown key", "did you mean sampler.steps?"]),
        ("nonsense=3", ["nonsense: unknown key", "allowed are name, output"]),
        ("rewards.preference.wieght=3", ["rewards.preference.wieght", "did you mean rewards.preference.weight?"]),
        ("rewards={rollout: {kind: ocr}}", ["rewards.rollout: this name is reserved for the rollout actors"]),
        ("eval_rewards={rollout: {kind: ocr}}", ["eval_rewards.rollout: this name is reserved"]),
        *(
            (f"rewards={{{name!r}: {{kind: ocr}}}}", [f"rewards.{name!r}: not usable as a name in metrics and files"])
            for name in ("", "..", "a/b", "质量", "a b", "-a", "a=b")
        ),
        (
            "eval_rewards={pre.ference: {kind: ocr}, pre-ference: {kind: ocr}}",
            ["eval_rewards.pre-ference: has the same name as pre.ference in Prometheus"],
        ),
        ("sampler.steps=many", ["sampler.steps: 'many' given", "integer"]),
        ("sampler.steps=0", ["sampler.steps: 0 given", "greater than 0"]),
        ("sampler.strides=[0, 1]", ["sampler.strides: [0, 1] given", "at least 1"]),
        ("sampler.branch_steps=[8, 10]", ["sampler.branch_steps: [8, 10] given", "0..9", "10 steps"]),
        ("sampler.branch_steps=[2, 1]", ["sampler.branch_steps", "ascending"]),
        ("sampler.kernel=sde", ["sampler.kernel: 'sde' given", "'flow', 'dance', 'cps' or 'ode'"]),
        ("sampler.shift=0.0", ["sampler.shift: 0.0 given", "greater than 0, or input should be 'dynamic'"]),
        ("name=../elsewhere", ["name: '../elsewhere' given"]),
        ("model.path.x=1", ["model.path.x", "path is not a section"]),
        ("sampler.stochastic_edges=8", ["sampler.branch_steps: [0, 1, 2, 3, 4] given", "0..2", "8 stochastic edges"]),
        ("sampler.group_size=1", ["credit.group: siblings given", "starts at index 0", "raise sampler.group_size"]),
        ("sampler.group_size=0", ["sampler.group_size: 0 given", "greater than or equal to 1"]),
        ("sampler.roots=300", ["sampler.roots × branch steps", "24000 images per prompt; with steps=10 at most 20000"]),
        ("sampler.trained_share=0", ["sampler.trained_share: 0 given", "greater than 0"]),
        ("credit.granularity_weights=[1]", ["credit.granularity_weights: [1.0] given", "sampler.strides=[1, 2]"]),
        ("credit.group=all", ["credit.group: 'all' given", "'siblings' or 'step'"]),
        ("credit.spread=all", ["credit.spread: 'all' given", "'group' or 'batch'"]),
        (
            "learner.objective=ppo",
            ["learner.objective: 'ppo' given", "'dppo', 'reinforce', 'nft', 'awm'"],
        ),
        ("learner.subpaths=[2]", ["learner.subpaths: [2] given", "only learner.objective=reinforce uses"]),
        (
            "sampler.kernel=ode",
            ["sampler.kernel: ode given", "learner.objective=clip", "flow, dance or cps", "nft"],
        ),
        ("learner.old_kl=1", ["learner.old_kl: 1 given", "learner.old_decay", "(it is clip)"]),
        ("learner.old_decay=[0, 0.1, 0.5]", ["learner.old_decay: [0.0, 0.1, 0.5] given", "=clip", "learner.old_kl"]),
        ("learner.updates_per_rollout=9", ["learner.updates_per_rollout: 9 given", "prompts_per_iteration=8"]),
        ("learner.advantage_clip=3", ["learner.advantage_clip: unknown key"]),
        ("method=grpo", ["method: 'grpo' given", "allowed are awm, branch_grpo, dance_grpo, diffusion_nft", "dot"]),
        ("method=3", ["method: 3 given", "tempflow_grpo"]),
        ("method=..", ["method: '..' given", "allowed are awm, branch_grpo"]),
        ("method=.x", ["method: '.x' given", "allowed are awm, branch_grpo"]),
        ("iterations=true", ["iterations: true given; must be a number"]),
        ("sampler.branch_steps=[0, false]", ["sampler.branch_steps.1: false given; must be a number"]),
        ("rollout.resources={CPU: yes}", ["rollout.resources.CPU: true given; must be a number"]),
        ("iterations=1:30", ["iterations: '1:30' given", "valid integer"]),
        ("credit.granularity_weights=[0, 0]", ["credit.granularity_weights: [0.0, 0.0] given", "above 0"]),
        ("output=s3://", ["output: 's3://' given", "names no bucket or folder", "s3://bucket/runs"]),
        ("output=s3:/bucket/runs", ["output: 's3:/bucket/runs' given", "two slashes"]),
        ("output=memory://x", ["output: 'memory://x' given", "one process only"]),
        ("data.embeddings=memory://x", ["data.embeddings: 'memory://x' given", "one process only"]),
        ("output=~unknownuser/x", ["output: '~unknownuser/x' given", "no user 'unknownuser'"]),
        ("output=''", ["output: '' given", "the name is empty"]),
        pytest.param("model.path=" + "x" * 256, ["model.path: 'xxx", "255 bytes"], id="a long path"),
        pytest.param("name=a\x01", ["--set name", "unacceptable character #x0001"], id="a control character"),
        ('model.negative_prompt="\\ud83d"', ["--set model.negative_prompt", "half of a surrogate pair"]),
        ("method=no.such_module", ["method: no.such_module cannot be imported", "PYTHONPATH"]),
        ("method=tests.support.faulty", ["method: the module tests.support.faulty lacks STEPS or preset"]),
        ("learner.zero_stage=4", ["learner.zero_stage: 4 given", "1, 2 or 3"]),
        ("learner={compile: true, zero_stage: 3}", ["learner.compile: true given", "learner.zero_stage=3"]),
        ("rollout.max_actors=1000000", ["rollout.max_actors: 1000000 given", "less than or equal to 4096"]),
        ("rollout.resources={GPU: 1.5}", ["rollout.resources.GPU: 1.5 given", "above 1 none"]),
        ("rollout.resources={CPU: -1}", ["rollout.resources.CPU: -1 given", "greater than or equal to 0"]),
        ("rollout.resources={memory: 1}", ["rollout.resources.memory: "]),
        ("learner.lr=.nan", ["learner.lr: nan given", "finite"]),
        ("learner.betas=[0.9, 1.5]", ["learner.betas.1: 1.5 given", "less than 1"]),
        ("learner.weight_decay=.inf", ["learner.weight_decay: inf given", "finite"]),
        ("sampler.shift=.inf", ["sampler.shift: inf given", "finite number, or input should be 'dynamic'"]),
        ("credit.granularity_weights=[1, .nan]", ["credit.granularity_weights.1: nan given", "finite"]),
        pytest.param("seed=0x" + "f" * 9999, ["seed: ", "too long to show given"], id="a long number"),
        pytest.param("name=" + "x" * 99999, ["name: 'xxx", "at most 100 characters"], id="a long name"),
        pytest.param(f"name={BOMB}", ["name", "more than 10000 values, with its aliases expanded"], id="an alias bomb"),
        pytest.param("name=" + "[" * 99999, ["name", "nested more than 32 deep"], id="a deep value"),
        pytest.param("name=&a [*a]", ["name", "nested more than 32 deep"], id="a value in itself"),
        pytest.param("name=" + " " * 2**21, ["name", "longer than 1048576 characters"], id="a text without end"),
        ("learner={lr: 1, lr: 2}", ["--set learner", "lr is given twice, again in line 1"]),
        ("a..b=3", ["--set: 'a..b=3' given", "section.key=value"]),
        ("just words", ["--set: 'just words' given", "section.key=value"]),
        ("seed=[", ["--set seed", "not a YAML value"]),
    ],
)
def test_a_refusal_is_one_line_that_names_key_value_and_what_is_allowed(override, parts):
    with pytest.raises(ValueError, match=r".") as refusal:
        load_config(None, [override])
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 500
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
        ("name: x\nseed: 1\nname: y\n", "name is given twice, again in line 3"),
        ("extends: other.yaml\n", "settings.yaml extends itself through other.yaml"),
        (f"name: {BOMB}\n", "more than 10000 values"),
        (f"name: {'[' * 100_000}", "nested more than 32 deep"),
        ("{[a]: b}", "is not YAML"),
        ("a: \xff", "is not YAML"),
        ("name: a\x01b", "is not YAML: unacceptable character #x0001"),
        ("extends: ~unknownuser/a.yaml", "settings.yaml: '~unknownuser/a.yaml' given; there is no user"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, part):
    path = tmp_path / "settings.yaml"
    (tmp_path / "other.yaml").write_text("extends: settings.yaml\n")
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=part) as refusal:
        load_config(str(path))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_numbers_are_what_they_look_like():
    """YAML 1.1 reads 8, 90 and a date."""
    values = {
        "010": 10,
        "-07": -7,
        "0x1F": 31,
        "40_000": 40_000,
        "1:30": "1:30",
        "2026-01-02": "2026-01-02",
        "0b1": "0b1",
    }
    values |= {"1.5": 1.5, ".5": 0.5, "1.0e-05": 1e-5, "1:30.5": "1:30.5", "true": True, "no": False, "~": None}
    assert {text: read_yaml(text) for text in values} == values
    assert load_config(None, ["iterations=010", "name=2026-01-02"]).iterations == 10


def test_a_method_of_one_s_own_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_methods.py").write_text("raise SystemExit('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"method: broken_methods.x cannot be imported \(SystemExit: no licence\)"):
        load_config(None, ["method=broken_methods.x"])


def test_every_number_has_both_bounds():
    """What is refused before anything starts cannot take a machine down."""
    schema = Config.model_json_schema()
    numbers, unbounded = [], []

    def walk(node, path):
        node = {**node, **schema["$defs"].get(node.get("$ref", "").rpartition("/")[2], {})}
        if node.get("type") in ("integer", "number") and not node.keys() & {"const", "enum"}:
            bounds = [node.keys() & {end, f"exclusive{end.capitalize()}"} for end in ("minimum", "maximum")]
            numbers.append(path)
            unbounded.extend([] if all(bounds) else [path])
        for name, part in node.get("properties", {}).items():
            walk(part, f"{path}.{name}")
        members = (*node.get("anyOf", ()), *node.get("prefixItems", ()))
        for part in (*members, node.get("items"), node.get("additionalProperties")):
            if isinstance(part, dict):
                walk(part, path)

    walk(schema, "")
    assert not unbounded
    assert {".learner.betas", ".rollout.resources", ".sampler.shift", ".rewards.weight"} < set(numbers)
    assert all(section.model_config["allow_inf_nan"] is False for section in Section.__subclasses__())


def test_a_reward_has_one_role():
    override = "eval_rewards.preference={kind: colour_accuracy}"
    with pytest.raises(ValueError, match="eval_rewards: preference is in `rewards` too"):
        load_config(None, [override])


def test_null_takes_a_reward_out():
    config = load_config(None, ["eval_rewards.shape=null"])
    assert list(config.eval_rewards) == ["colour"]
    with pytest.raises(ValueError, match="rewards"):
        load_config(None, ["rewards.preference=null"])


def extending(folder, *texts):
    """The path of the last of several files, each of which extends the one before it."""
    before = "embedded:config.yaml"
    for number, text in enumerate(texts):
        (folder / f"{number}.yaml").write_text(f"extends: {before}\n{text}\n")
        before = f"{number}.yaml"
    return str(folder / before)


def test_a_preset_is_above_what_is_extended_and_below_what_is_given_with_it_or_later(tmp_path):
    path = extending(
        tmp_path,
        "sampler: {eta: 0.5, group_size: 4, roots: 3}\ncredit: {clip: 3}\nlearner: {lr: 0.5, clip_range: 0.5}",
        "method: mix_grpo\nsampler: {group_size: 6}",
        "sampler: {slide_every: 7}",
    )
    config = load_config(path, ["credit.spread=batch"])
    sampler = config.sampler
    assert (sampler.stochastic_edges, sampler.branch_schedule, sampler.branch_steps) == (4, "slide", (0,))
    assert (sampler.eta, sampler.roots, config.credit.clip, config.learner.clip_range) == (0.7, 1, 5, 1e-4)  # replaced
    assert (sampler.group_size, sampler.slide_every, config.credit.spread) == (6, 7, "batch")  # given with it, or later
    assert (config.credit.group, config.learner.updates_per_rollout, config.evaluation.anchors) == ("step", 4, False)
    assert (sampler.steps, config.learner.lr, config.model.path) == (10, 0.5, "embedded:pipeline")  # not a method's
    # an override of `method` is above every file, and below the other overrides wherever they are
    config = load_config(path, ["sampler.eta=0.2", "method=tempflow_grpo"])
    assert (config.sampler.eta, config.sampler.group_size, config.sampler.slide_every) == (0.2, 6, 25)
    assert config.learner.edge_weight == 1.73


def test_a_preset_follows_the_steps_wherever_they_are_given(tmp_path):
    path = extending(tmp_path, "sampler: {steps: 7}", "method: flow_grpo")
    assert load_config(path).sampler.stochastic_edges == 7
    assert load_config(path, ["sampler.steps=4"]).sampler.untrained == (3,)


def test_naming_the_same_method_again_changes_nothing(tmp_path):
    once = ["method: mix_grpo\nsampler: {eta: 0.5}", "sampler: {group_size: 4}"]
    again = [*once, "method: mix_grpo"]
    config = load_config(extending(tmp_path, *once))
    assert (config.sampler.eta, config.sampler.group_size) == (0.5, 4)
    assert load_config(extending(tmp_path, *again)) == config
    assert load_config(extending(tmp_path, *again), ["method=mix_grpo"]) == config
    other = load_config(extending(tmp_path, *once, "method: g2rpo", "method: mix_grpo"))
    assert (other.sampler.eta, other.sampler.group_size) == (0.7, 12)  # another one was between them


def test_a_method_of_one_s_own_by_its_import_path(tmp_path, monkeypatch):
    folder = tmp_path / "my_methods_of_test_config"
    folder.mkdir()
    (folder / "windows.py").write_text(
        "STEPS = 16\n\n\ndef preset(steps):\n"
        "    sampler = {'branch_steps': [0, steps // 2], 'stochastic_edges': 2}\n"
        "    return {'sampler': sampler, 'credit': {'group': 'step'}}\n"
    )
    (folder / "wrong.py").write_text("STEPS = 16\n\n\ndef preset(steps):\n    return {'samplr': {}}\n")
    (folder / "misspelt.py").write_text("STEPS = 16\n\n\ndef preset(steps):\n    return {'credit': {'grp': 'step'}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(None, ["method=my_methods_of_test_config.windows", "sampler.group_size=5"])
    assert (config.sampler.branch_steps, config.sampler.stochastic_edges, config.credit.group) == ((0, 5), 2, "step")
    assert (config.sampler.group_size, config.sampler.strides) == (5, (1,))  # what it does not give is neutral
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    with pytest.raises(ValueError, match="has a section samplr; allowed are sampler, credit, learner, evaluation"):
        load_config(None, ["method=my_methods_of_test_config.wrong"])
    with pytest.raises(ValueError, match="credit.grp: unknown key; did you mean credit.group"):
        load_config(None, ["method=my_methods_of_test_config.misspelt"])


def test_the_defaults_of_the_schema_are_the_preset_of_g2rpo():
    sections = {
        "sampler": SamplerConfig(), "credit": CreditConfig(), "learner": LearnerConfig(),
        "evaluation": EvaluationConfig(),
    }  # fmt: skip
    given = preset("g2rpo", 16)
    assert given.keys() == sections.keys()
    for name, section in sections.items():
        defaults = section.model_dump(mode="json")
        assert {key: defaults[key] for key in given[name]} == given[name]
        if name in ("sampler", "credit"):  # a method decides all of these
            assert given[name].keys() == defaults.keys() - {"shift", "guidance", "auto"}
    assert preset("g2rpo") == given  # 16 are the paper's


@pytest.mark.parametrize("name", method_names())
def test_every_method_loads_on_the_quickstart_at_any_number_of_steps(name):
    own = preset(name)["sampler"]["steps"]
    for steps in (own, 25, 10, 4):
        config = load_config(None, [f"method={name}", f"sampler.steps={steps}"])
        assert (config.method, config.sampler.steps) == (name, steps)
        given = preset(name, steps)
        if name == load_config().method:  # the quickstart's file names it and has numbers of its own
            given["sampler"] |= {"group_size": 8, "strides": [1, 2]}
        assert {key: config.sampler.model_dump(mode="json")[key] for key in given["sampler"]} == given["sampler"]
        assert config.credit.model_dump(mode="json") == given["credit"]


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_a_few_lines_of_data(name):
    text = (Path(methods.__path__[0]) / f"{name}.py").read_text()
    docstring = ast.parse(text).body[0]
    assert ast.get_docstring(ast.parse(text))
    code = text.splitlines()[docstring.end_lineno :]
    assert len([line for line in code if line.strip() and not line.strip().startswith("#")]) <= 30


def test_a_comparison_group_of_one_edge_is_refused():
    with pytest.raises(ValueError, match="credit.group: siblings given, but a trained edge that starts at index 1 is"):
        load_config(None, ["method=mix_grpo", "credit.group=siblings"])  # a chain's edges have no siblings
    with pytest.raises(ValueError, match="credit.group: step given, but a trained edge that starts at index 0 is"):
        load_config(None, ["method=flow_grpo", "sampler.roots=1"])
    assert load_config(None, ["method=flow_grpo", "sampler.roots=1", "sampler.group_size=24"])  # `same_latent`
    only_first = ["method=mix_grpo", "credit.group=siblings", "sampler.untrained=[1, 2, 3]"]
    with pytest.raises(ValueError, match="a trained edge that starts at index 4 is alone"):
        load_config(None, only_first)  # the window slides
    assert load_config(None, [*only_first, "sampler.branch_schedule=fixed"])


@pytest.mark.parametrize("method", ["awm", "diffusion_nft", "pave_grpo"])
def test_log_probs_of_the_rollout_are_refused_where_nothing_reads_them(method):
    objective = load_config(None, [f"method={method}"]).learner.objective
    with pytest.raises(
        ValueError, match=f"learner.old_log_prob: rollout given, but learner.objective={objective} does"
    ):
        load_config(None, [f"method={method}", "learner.old_log_prob=rollout"])
    assert load_config(None, ["learner.old_log_prob=rollout"]).learner.old_log_prob == "rollout"


def test_subpaths_are_few():
    with pytest.raises(ValueError, match="learner.subpaths.1: 10000000000 given; .* less than or equal to 16"):
        load_config(None, ["method=pave_grpo", "learner.subpaths=[2, 10000000000]"])


def test_a_tree_without_a_trained_edge_is_refused():
    with pytest.raises(ValueError, match=r"sampler.untrained: \[0\] given, but all edges of branch_steps=\[0\]"):
        load_config(None, ["sampler.branch_steps=[0]", "sampler.untrained=[0]"])
    drawn = ["sampler.branch_schedule=draw", "sampler.branch_steps=[1, 5]", "sampler.untrained=[5]"]
    with pytest.raises(ValueError, match=r"but all edges of branch_steps=\[5\] start there"):
        load_config(None, drawn)


def test_a_trained_step_without_noise_is_refused():
    """Flow-CPS has no noise in a step that ends at the image."""
    chain = ["method=flow_grpo", "sampler.kernel=cps", "sampler.eta=0.8"]
    assert load_config(None, chain).sampler.untrained == (9,)
    with pytest.raises(
        ValueError, match="sampler.kernel: cps given, which has no noise in a step that ends at the"
    ) as e:
        load_config(None, [*chain, "sampler.untrained=[]"])
    assert "reach index 10" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="sampler.kernel: cps given"):
        load_config(None, ["method=flow_grpo_fast", "sampler.branch_steps=[3, 8]"])


def test_the_settings_reference_is_what_the_models_say():
    """`python docs/settings.py --write` makes it; every setting has a meaning."""
    made = subprocess.run([sys.executable, "docs/settings.py"], capture_output=True, text=True, check=True).stdout
    assert made == Path("docs/settings.md").read_text()
    rows = [row for row in made.splitlines() if row.startswith("| `")]
    assert len(rows) > 90
    assert not [row for row in rows if re.search(r"\|  (\*By|\|)", row)]
    assert (
        "| `sampler.eta` | number, > 0, ≤ 100 | `0.7` | η, noise level of a stochastic step. *By method:* `0.7`; "
        in made
    )
