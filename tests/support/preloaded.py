"""Ray's workers in tests fork from one process that has loaded torch, diffusers and peft.

These imports are most of what a small run takes, in each of its processes.

    python tests/support/preloaded.py serve SOCKET       the process that forks; it ends with the one that started it
    python tests/support/preloaded.py run ARGUMENT ...   `python ARGUMENT ...`, forked if it is a worker

Ray starts `run`, which passes signals on and ends as its worker does; `tests.support.runs.descendants` finds the worker
by the name of `run`'s process. A run's driver and other processes of Ray are not preloaded, nor is a worker in a
namespace of process ids of its own.
"""

import atexit
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module

SERVER = "G2RPO_TESTS_PRELOADED"  # the socket, and the namespace of process ids
MODULES = ["torch", "torchvision", "transformers", "peft", "g2rpo_ray.rollout.sampler", "g2rpo_ray.rewards.hpsv2"]
MODULES += ["g2rpo_ray.learner.engine"]
OF_DIFFUSERS = ["FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"]  # which diffusers loads when asked
READ_AT_IMPORT = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "DIFFUSERS_")
READY = "ready\n"
BIGGEST = 1 << 20  # bytes of a request
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def serving() -> Iterator[str]:
    """The value of SERVER, inside the context."""
    with tempfile.TemporaryDirectory() as folder:
        address = os.path.join(folder, "s")
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        served = [sys.executable, __file__, "serve", address]
        with subprocess.Popen(served, env=one_thread, stdout=subprocess.PIPE, text=True) as server:
            assert READY in server.stdout, "the process that forks workers has ended: see what it printed"
            yield f"{address} {_namespace()}"
            assert server.poll() is None, "the process that forks workers has ended"
            server.kill()


def environment(server: str) -> dict[str, str]:
    """What has the workers of all jobs preloaded that begin with these variables."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {SERVER: server, "RAY_RUNTIME_ENV_HOOK": "tests.support.preloaded.runtime_env", "PYTHONPATH": path}


def runtime_env(given: dict | None) -> dict:
    """Ray's hook."""
    return {"py_executable": f"{sys.executable} -SEs {os.path.abspath(__file__)} run", **(given or {})}


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that libraries read when they are imported."""
    return {name: value for name, value in variables.items() if name.startswith(READ_AT_IMPORT)}


def _environment_of(connected: socket.socket) -> dict[str, str]:
    """That of the process at the other end, as it was started."""
    server, *_ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    with open(f"/proc/{server}/environ") as file:
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)


def run(arguments: list[str]) -> None:
    """Be `python` with these arguments; never returns."""
    script = next((argument for argument in arguments if not argument.startswith("-")), "")
    address, _, namespace = os.environ.get(SERVER, "").partition(" ")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    server = socket.socket(socket.AF_UNIX)
    try:
        if not script.endswith("default_worker.py") or namespace != _namespace():
            raise OSError("not for the server")
        server.connect(address)
        if _read_at_import(os.environ) != _read_at_import(_environment_of(server)):
            raise OSError("what is imported there may differ")
        request = {
            "arguments": arguments[arguments.index(script) :], "environment": dict(os.environ), "folder": os.getcwd(),
            "blocked": [int(number) for number in blocked],
        }  # fmt: skip
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        answers = server.makefile()
        worker = int(answers.readline())
    except (OSError, ValueError):
        server.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.execv(sys.executable, [sys.executable, *arguments])
    with open("/proc/self/comm", "w") as name:
        name.write(f"as {worker}")
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(worker, number))
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    status = int(answers.readline() or -signal.SIGKILL)
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


class Server:
    """Forks a worker for each `run`, kills it when its `run` is gone, and tells `run` when it has ended."""

    def __init__(self, address: str):
        self._parent = os.getppid()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{address}.new")
        self._listener.listen(64)
        os.rename(f"{address}.new", address)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self) -> None:
        while os.getppid() == self._parent:
            for key, _ in self._selector.select(timeout=1):
                if key.data is None:
                    self._fork()
                    continue
                worker, client, handle = key.data
                if key.fd == handle:
                    self._tell(worker, client, handle)
                elif not client.recv(1):
                    self._selector.unregister(client)
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _fork(self) -> None:
        client, _ = self._listener.accept()
        message, descriptors, _, _ = socket.recv_fds(client, BIGGEST, 3)
        if not message:  # it decided to be a process of its own
            client.close()
            return
        worker = os.fork()
        if not worker:
            self._selector.close()
            self._listener.close()
            client.close()
            _become(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        handle = os.pidfd_open(worker)
        with suppress(OSError):
            client.sendall(f"{worker}\n".encode())
        for waited in (client, handle):
            self._selector.register(waited, selectors.EVENT_READ, (worker, client, handle))

    def _tell(self, worker: int, client: socket.socket, handle: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        self._selector.unregister(handle)
        os.close(handle)
        with suppress(KeyError):
            self._selector.unregister(client)
        with suppress(OSError):
            client.sendall(f"{status}\n".encode())
        client.close()


def _become(request: dict, descriptors: list[int]) -> None:
    """Be the process that was asked for; never returns."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()  # as in each process that is started
    sys.modules["numpy"].random.seed()
    sys.argv = request["arguments"]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [os.path.dirname(os.path.abspath(sys.argv[0])), *given, *sys.path[1:]]
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(status)


def _preload() -> None:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # a file there must not stand for a library
    for module in MODULES:
        import_module(module)
    for name in OF_DIFFUSERS:
        getattr(import_module("diffusers"), name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot fork safely"


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2:])
    server = Server(sys.argv[2])
    _preload()
    print(READY, end="", flush=True)
    server.serve()
