"""Ray's workers in tests, and some commands, fork from one process that has loaded torch, diffusers and peft.

These imports are most of what a small run takes, in each of its processes.

    python tests/support/preloaded.py serve SOCKET        the process that forks; it ends with the one that started it
    python tests/support/preloaded.py work ARGUMENT ...   `python ARGUMENT ...`, forked if it is a worker
    python tests/support/preloaded.py fork ARGUMENT ...   `python ARGUMENT ...`, forked; see `python`

Ray starts `work`, which passes signals on and ends as its worker does; `tests.support.runs.descendants` finds the
worker by the name of `work`'s process. A run's driver and other processes of Ray are not preloaded, nor is what has a
namespace of process ids of its own.
"""

import atexit
import json
import os
import random
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
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

SERVER = "G2RPO_TESTS_PRELOADED"  # the socket, and the namespace of process ids; a variable of all processes of tests
MODULES = ["torch", "torchvision", "transformers", "peft", "g2rpo_ray.rollout.sampler", "g2rpo_ray.rewards.hpsv2"]
MODULES += ["g2rpo_ray.learner.engine"]
OF_DIFFUSERS = ["FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"]  # which diffusers loads when asked
READ_AT_IMPORT = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "DIFFUSERS_")
BIGGEST = 1 << 20  # bytes of a request
PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def serving() -> Iterator[None]:
    """Inside the context there is the process that forks. It loads the modules when it is first asked."""
    with tempfile.TemporaryDirectory() as folder:
        address = os.path.join(folder, "s")
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen([sys.executable, __file__, "serve", address], env=one_thread) as server:
            os.environ[SERVER] = f"{address} {_namespace()}"
            yield
            assert server.poll() is None, "the process that forks workers has ended"
            server.kill()


def python(*arguments: object) -> list[str]:
    """The command line of `python ARGUMENT ...` (a script, -m or -c) as a process that forks."""
    return [sys.executable, "-SEs", os.path.abspath(__file__), "fork", *map(str, arguments)]


def environment() -> dict[str, str]:
    """What has the workers of all jobs preloaded that begin with these variables."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {"RAY_RUNTIME_ENV_HOOK": "tests.support.preloaded.runtime_env", "PYTHONPATH": path}


def runtime_env(given: dict | None) -> dict:
    """Ray's hook."""
    return {"py_executable": f"{sys.executable} -SEs {os.path.abspath(__file__)} work", **(given or {})}


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


def work(arguments: list[str]) -> None:
    """Be Ray's `python` with these arguments; never returns."""
    script = next((argument for argument in arguments if not argument.startswith("-")), "")
    if script.endswith("default_worker.py"):
        fork(arguments, arguments[arguments.index(script) :])
    os.execv(sys.executable, [sys.executable, *arguments])


def fork(arguments: list[str], forked: list[str]) -> None:
    """Be `python` with the arguments `forked`, as a process that forks, else with `arguments`; never returns."""
    address, _, namespace = os.environ.get(SERVER, "").partition(" ")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    server = socket.socket(socket.AF_UNIX)
    try:
        if namespace != _namespace():
            raise OSError("not for the server")
        server.connect(address)
        if _read_at_import(os.environ) != _read_at_import(_environment_of(server)):
            raise OSError("what is imported there may differ")
        request = {
            "arguments": forked, "environment": dict(os.environ), "folder": os.getcwd(),
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
    """Forks a process for each client, kills it when its client is gone, and tells the client when it has ended."""

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
        _preload()
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
    first, *others = request["arguments"]
    how, *sys.argv = [first, *others] if first in ("-m", "-c") else ["", first, *others]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["" if how else os.path.dirname(os.path.abspath(sys.argv[0])), *given, *sys.path[1:]]
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    try:
        _execute(how)
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


def _execute(how: str) -> None:
    """Execute the program, module or script that comes first in sys.argv, as the module __main__."""
    name = sys.argv[0]
    main = sys.modules["__main__"] = sys.modules["__mp_main__"] = ModuleType("__main__")  # multiprocessing's name of it
    if how == "-c":
        code, sys.argv[0] = compile(name, "<string>", "exec"), how
    elif how == "-m":
        package = find_spec(name).submodule_search_locations is not None
        main.__spec__ = spec = find_spec(f"{name}.__main__" if package else name)
        main.__file__ = sys.argv[0] = spec.origin
        code, main.__package__ = spec.loader.get_code(spec.name), spec.parent
    else:
        main.__file__ = os.path.abspath(name)
        with open(name, "rb") as script:
            code = compile(script.read(), name, "exec")
    exec(code, main.__dict__)


@cache
def _preload() -> None:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # a file there must not stand for a library
    for module in MODULES:
        import_module(module)
    for name in OF_DIFFUSERS:
        getattr(import_module("diffusers"), name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot fork safely"


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(sys.argv[2:])
    if sys.argv[1] == "fork":
        fork(sys.argv[2:], sys.argv[2:])
    Server(sys.argv[2]).serve()
