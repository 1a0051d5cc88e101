"""Who may use a cluster, what a run writes down, what its files can do, and where it may write."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from g2rpo_ray.config import ModelConfig, load_config
from g2rpo_ray.models import FlowModel, read_lora
from g2rpo_ray.rewards.weights import pretrained, read_weights
from g2rpo_ray.run import main
from tests.runs import PATIENCE, command, descendants, head_command, kill_all, metrics, title_of, wait_for
from tests.test_system import listens
from tests.test_unified_reward import KEY, chat_server
from tests.tiny_flux import write_tiny_flux

PORT, DASHBOARD = 6396, 8296
BINARIES = Path(sys.executable).parent
TOKEN, WRONG = "0123456789abcdef" * 4, "fedcba9876543210" * 4
MARK = "not-to-be-written-anywhere"  # in the environment under a name of its own
REFUSED = {
    "no token": {"RAY_AUTH_MODE": "token"},
    "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG},
    "a client that knows of no tokens": {"RAY_AUTH_MODE": "disabled"},
}


def environment(home, variables):
    """That of the tests, with these variables alone to say who asks."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return {**own, "HOME": str(home), "PATH": f"{BINARIES}:{own['PATH']}", **variables}


def ask(words, home, variables):
    return subprocess.run(
        words, env=environment(home, variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip


def submit(*entry):
    return [BINARIES / "ray", "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}", "--", *entry]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Without a token of an earlier Ray."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def guarded(home):
    """A cluster that wants a token, its nodes with secrets in their environment: its variables."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "JUDGE_KEY": KEY, "SOMETHING_ELSE": MARK}
    head = subprocess.Popen(
        head_command(PORT, f"--dashboard-port={DASHBOARD}", "--dashboard-host=127.0.0.1", "--num-cpus=2",
                     "--object-store-memory=200000000"),
        env=environment(home, variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(head, lambda: listens(PORT) and listens(DASHBOARD))
        wait_for(head, lambda: ask(submit("true"), home, variables).returncode == 0)  # its agent may come later
        yield variables
    finally:
        kill_all(head)


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.cluster
@pytest.mark.parametrize("case", REFUSED)
def test_a_cluster_is_closed_to(case, guarded, home, tmp_path):
    check = command(tmp_path / "runs", "x", "--check", "--address", f"127.0.0.1:{PORT}")
    done = ask(check, home, REFUSED[case])
    told = [line for line in done.stdout.splitlines() if line.startswith("error: ")]  # below the plan
    assert done.returncode == 2
    assert len(told) == 1, done.stdout
    assert told[0].startswith(f"error: --address: the Ray cluster at 127.0.0.1:{PORT} asks for a token")
    job = ask(submit("touch", str(tmp_path / "touched")), home, REFUSED[case])
    assert job.returncode != 0
    assert "uthentication" in job.stdout
    assert not list(tmp_path.iterdir())
    for printed in (done.stdout, job.stdout):
        assert not leaks(printed.encode())


@pytest.mark.cluster
def test_the_dashboard_tells_nothing_without_the_token(guarded):
    for path in ("api/jobs/", "nodes?view=summary", "api/v0/actors"):
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"http://127.0.0.1:{DASHBOARD}/{path}")


@pytest.mark.cluster
def test_a_private_cluster_has_a_token_that_nobody_can_see(tmp_path):
    """Whose ports are open to the network."""
    program = (
        "from actors.cluster import cluster\n"
        "with cluster(None):\n"
        "    import ray; print(ray.get_runtime_context().gcs_address, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment(tmp_path, {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as owner:  # fmt: skip
        address = owner.stdout.readline().strip()
        processes = descendants(owner)
        (token,) = {token_of(process) for process in processes} - {None}  # workers hide theirs
        assert len(token) == 64
        assert token not in " ".join(map(title_of, processes))
        check = command(tmp_path / "runs", "x", "--check", "--address", address)
        assert "asks for a token" in ask(check, tmp_path, {"RAY_AUTH_MODE": "disabled"}).stdout
        owner.communicate("\n")


def token_of(process):
    try:
        return process.environ().get("RAY_AUTH_TOKEN")
    except psutil.NoSuchProcess:  # it ended meanwhile
        return None


# ------------------------------------------------------------------------------------------------------------ secrets


def leaks(content):
    """Which secrets some bytes hold."""
    return [secret for secret in (TOKEN, WRONG, KEY, MARK) if secret.encode() in content]


@pytest.mark.cluster
def test_a_run_with_the_token_works_and_writes_down_no_secret(guarded, home, tmp_path):
    """A reward's key and the token come by the environment, and stay there."""
    with chat_server(KEY) as url:
        judge = {"kind": "unified_reward", "options": {"base_urls": url, "api_key_env": "JUDGE_KEY"}, "resources": {}}
        entry = command(
            tmp_path, "secretive", iterations=1, eval_rewards={"judge": judge}, tracking__tensorboard="true"
        )
        done = ask(submit("python", *entry[1:]), home, guarded)
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    assert metrics(tmp_path, "secretive")[1]["eval/judge/mean"] == 3  # the judge had its key
    assert not leaks(done.stdout.encode())
    run = tmp_path / "secretive"
    assert "JUDGE_KEY" in (run / "config.yaml").read_text()  # its name alone
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "tensorboard"} <= {path.relative_to(run).parts[0] for path in files}
    for path in files:
        assert not leaks(path.read_bytes()), path


# ------------------------------------------------------------------------------------------------------------ pickles


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture
def touched(tmp_path):
    return tmp_path / "touched"


@pytest.fixture(params=[True, False], ids=["zip", "before zip"])
def write(request, touched):
    """Writes a file of torch.save, in either format, that runs code when it is unpickled."""

    def write(file):
        content = {"weight": torch.zeros(2), "payload": Payload(touched)}
        torch.save(content, file, _use_new_zipfile_serialization=request.param)

    return write


def test_the_payload_works(write, touched, tmp_path):
    write(tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert touched.exists()


def test_a_reward_s_checkpoint_runs_no_code(write, touched, tmp_path):
    for name in ("weights.pt", "weights.bin", "weights.safetensors"):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=r"^checkpoint: .* can't read"):
            read_weights(tmp_path / name)
    assert not touched.exists()


def test_an_adapter_runs_no_code(write, touched, tmp_path):
    for name in ("pytorch_lora_weights.safetensors", "adapter.bin"):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=r"^LoRA .*cannot read"):
            read_lora(tmp_path / name)
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match=r"^LoRA .*cannot read"):
        read_lora(tmp_path)  # diffusers would take the .bin
    assert not touched.exists()


def test_a_checkpoint_runs_no_code(write, touched, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from learner.engine import CHECKPOINT, _read_checkpoint

    write(tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="cannot be read"):
        _read_checkpoint(tmp_path / CHECKPOINT, {})
    assert not touched.exists()


@pytest.mark.parametrize(
    ("part", "file", "wanted"),
    [
        ("transformer", "diffusion_pytorch_model.bin", "transformer"),
        ("vae", "diffusion_pytorch_model.bin", "vae"),
        ("text_encoder", "pytorch_model.bin", "text_encoders"),
        ("text_encoder_2", "pytorch_model.bin", "text_encoders"),
    ],
)
def test_a_pipeline_runs_no_code(part, file, wanted, write, touched, tmp_path):
    pipeline = write_tiny_flux(tmp_path / "pipeline")
    for weights in (pipeline / part).glob("*.safetensors"):
        weights.unlink()
    write(pipeline / part / file)
    with pytest.raises(ValueError, match="model.path: cannot load"):
        FlowModel.load(ModelConfig(path=str(pipeline), dtype="float32", height=16, width=16), "cpu", **{wanted: True})
    assert not touched.exists()


def test_a_reward_s_model_folder_runs_no_code(write, touched, tmp_path):
    small = CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    CLIPTextModel(small).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    write(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^model: CLIPTextModel can't load"):
        pretrained(CLIPTextModel, "model", str(tmp_path / "model"))
    assert not touched.exists()


# -------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/tmp/x", "a/b", "a/../../x", ".x", "-x", "a\\b", "x\n", "x\0"]
)
def test_a_run_s_name_is_one_folder(name):
    with pytest.raises(ValueError, match=r"^name: ") as refusal:
        load_config(None, [f"name={json.dumps(name)}"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["../secret", "lora/../../secret", "ABSOLUTE"])
def test_a_checkpoint_s_files_are_in_its_folder(name, tmp_path, capsys):
    """Its list is not followed out of it, though the checksum is right."""
    folder, secret = tmp_path / "checkpoint", tmp_path / "secret"
    (folder / "lora").mkdir(parents=True)
    secret.write_text("mine")
    files = {name.replace("ABSOLUTE", str(secret)): sha256(b"mine").hexdigest()}
    (folder / "state.json").write_text(json.dumps({"iteration": 1, "files": files}))
    assert main(["--set", f"output={tmp_path / 'runs'}", "--resume", str(folder)]) == 2
    assert "is not a readable checkpoint" in capsys.readouterr().err
