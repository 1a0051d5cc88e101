"""One process at a time writes a run's directory: the one that holds its lease.

`lease.json` says who holds it; a thread rewrites it every few seconds, whatever the event loop does. On the same
machine a holder is dead when its process is; elsewhere when the file stays as it is for STALE_S: the clocks of two
machines are never compared. Where the storage has locks, taking it is atomic; elsewhere it is written, and read again
after SETTLE_S.
"""

import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from g2rpo_ray.record.storage import Folder

logger = logging.getLogger(__name__)

LEASE = "lease.json"
BEAT_S, STALE_S, SETTLE_S = 5.0, 60.0, 2.0
Holder = dict[str, Any]


class LeaseLost(RuntimeError):
    """Another process writes the run now."""


class Lease:
    """Held inside the context.

    Raises (on entering):
        ValueError: one line; another process holds it, or the directory cannot be written.
    """

    def __init__(self, run: Folder):
        self._run = run
        self._holder: Holder = {
            "token": uuid.uuid4().hex, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(),
            "started": _started(os.getpid()), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S UTC}", "beats": 0,
        }  # fmt: skip
        self._renewing = threading.Lock()
        self._renewed_at = time.time()
        self._before: Holder | None = None
        self._lost: Holder | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        try:
            while not self._take(_wait_until_free(self._run)):
                pass  # somebody was faster: say who
        except OSError as error:
            raise ValueError(f"output: cannot use {self._run}: {error.strerror or error}") from None
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(timeout=BEAT_S)
        with suppress(OSError):
            if _is(self._holder, _read(self._run)):
                self._run.delete(LEASE)
            if self._run.path:
                self._run.path.rmdir()  # where nothing was written

    def check(self) -> None:
        """To be called before the run is written.

        Raises:
            LeaseLost: another process has taken it, as it may when this one stood still for a minute.
        """
        if time.time() - self._renewed_at > STALE_S / 2:
            self._renew()
        if self._lost is not None:
            raise LeaseLost(
                f"{self._run} was taken over by {_name(self._lost)}, since this process gave no sign of life for "
                f"{STALE_S:.0f} s or {LEASE} was deleted; nothing more is written here"
            )

    def _take(self, last: Holder | None) -> bool:
        with _locked(self._run) as locked:
            if _read(self._run) != last:
                return False
            self._write()
            self._before = last
        if not locked:
            time.sleep(SETTLE_S)
        return _is(self._holder, _read(self._run))

    def _keep_renewing(self) -> None:
        while not self._end.wait(BEAT_S) and self._lost is None:
            self._renew()

    def _renew(self) -> None:
        with self._renewing:
            try:
                begin = time.time()
                self._write_if_held()
                while self._lost is None and time.time() - begin > STALE_S / 2:
                    # It stood still between reading and writing: whoever took the lease meanwhile is overwritten, and
                    # takes it back at its next beat.
                    time.sleep(2 * BEAT_S)
                    begin = time.time()
                    self._write_if_held()
                self._renewed_at = begin
            except OSError as error:
                logger.warning("the lease cannot be renewed, it will be tried again: %s", error)

    def _write_if_held(self) -> None:
        now = _read(self._run)
        if _is(self._holder, now) or (self._before is not None and _is(self._before, now)):
            self._write()
        else:
            self._lost = now or {}

    def _write(self) -> None:
        self._holder["beats"] += 1
        self._run.write(LEASE, (json.dumps(self._holder) + "\n").encode())


def _wait_until_free(run: Folder) -> Holder | None:
    """The lease as a dead process left it, or None where there is none; raises ValueError if the holder lives."""
    last = _read(run)
    if last is None:
        return None
    if last.get("machine") == _machine():
        if _started(last["pid"]) != last["started"]:
            return last
        raise ValueError(_refusal(run, last))
    print(f"{run}: held by {_name(last)}; waiting up to {STALE_S:.0f} s for a sign of life", file=sys.stderr)
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(1)
        now = _read(run)
        if now is None:
            return None
        if now != last:
            raise ValueError(_refusal(run, now))
    return last


def _refusal(run: Folder, holder: Holder) -> str:
    return (
        f"{run} is in use by {_name(holder)}: one process writes there at a time; wait for that one, end it, or give "
        "another --name for a run, another --output for a study"
    )


def _name(holder: Holder) -> str:
    given = {"pid": "?", "host": "an unknown host", "since": "an unknown time", **holder}
    return f"process {given['pid']} on {given['host']}, since {given['since']}"


def _read(run: Folder) -> Holder | None:
    if not run.exists(LEASE):
        return None
    try:
        holder = json.loads(run.read(LEASE))
    except ValueError:
        holder = None
    except FileNotFoundError:  # given back meanwhile
        return None
    return holder if isinstance(holder, dict) else {}


def _is(holder: Holder, other: Holder | None) -> bool:
    return other is not None and "token" in holder and other.get("token") == holder["token"]


def _machine() -> str:
    """What decides whether a process id means the same there and here: the boot and the namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return uuid.uuid4().hex  # unlike any other


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot; None where it has ended: a process id is given again."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


@contextmanager
def _locked(run: Folder) -> Iterator[bool]:
    """Nobody else takes the lease meanwhile, where the storage has locks: whether it has."""
    if run.path is None:
        yield False
        return
    run.path.mkdir(parents=True, exist_ok=True)
    folder = os.open(run.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(folder)  # and with it the lock
