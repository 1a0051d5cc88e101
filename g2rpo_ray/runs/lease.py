"""The lease of a run directory: only its holder writes there.

`lease.json` names the holder; a thread rewrites it every `RENEW_EVERY_S`, independent of the event loop. A holder on
the same machine is dead when its process is; a holder elsewhere when the file is unchanged for `STALE_AFTER_S`, so
that clocks of two machines are never compared. If the storage has locks, taking the lease is atomic; otherwise it is
written, and read again after `SETTLE_S`.
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

from g2rpo_ray.exits import RunFailed
from g2rpo_ray.runs.storage import Folder

logger = logging.getLogger(__name__)

LEASE = "lease.json"
RENEW_EVERY_S, STALE_AFTER_S, SETTLE_S = 5.0, 60.0, 2.0
Holder = dict[str, Any]


class LeaseLost(RunFailed):
    """Another process writes the run now."""


class Lease:
    """The lease of a run directory, held inside the context.

    Raises (on entering):
        ValueError: another process holds it, or the directory cannot be written.
    """

    def __init__(self, run: Folder, wait_s: float = 0.0):
        """`wait_s`: seconds to wait for a living holder to end."""
        self._run = run
        self._wait_s = wait_s
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
            deadline = time.monotonic() + self._wait_s
            while not self._take(_wait_until_free(self._run, deadline)):
                pass  # another process was faster: look again
        except OSError as error:
            raise ValueError(f"output: cannot use {self._run}: {error.strerror or error}") from None
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(timeout=RENEW_EVERY_S)
        with suppress(OSError):
            if _is(self._holder, _read(self._run)):
                self._run.delete(LEASE)
            if self._run.path:
                self._run.path.rmdir()  # if nothing was written

    def check(self) -> None:
        """Call this before writing to the run directory.

        Raises:
            LeaseLost: another process has taken the lease, as it may if this one hung for a minute.
        """
        if time.time() - self._renewed_at > STALE_AFTER_S / 2:
            self._renew()
        if self._lost is not None:
            raise LeaseLost(
                f"{self._run} was taken over by {_name(self._lost)}, because this process did not renew its lease for "
                f"{STALE_AFTER_S:.0f} s, or {LEASE} was deleted; this process stops writing"
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
        while not self._end.wait(RENEW_EVERY_S) and self._lost is None:
            self._renew()

    def _renew(self) -> None:
        with self._renewing:
            try:
                begin = time.time()
                self._write_if_held()
                while self._lost is None and time.time() - begin > STALE_AFTER_S / 2:
                    # This process hung between reading and writing. If another one took the lease meanwhile, it was
                    # overwritten, and takes the lease back at its next renewal.
                    time.sleep(2 * RENEW_EVERY_S)
                    begin = time.time()
                    self._write_if_held()
                self._renewed_at = begin
            except OSError as error:
                logger.warning("the lease could not be renewed and will be retried: %s", error)

    def _write_if_held(self) -> None:
        now = _read(self._run)
        if _is(self._holder, now) or (self._before is not None and _is(self._before, now)):
            self._write()
        else:
            self._lost = now or {}

    def _write(self) -> None:
        self._holder["beats"] += 1
        self._run.write(LEASE, (json.dumps(self._holder) + "\n").encode())


def _wait_until_free(run: Folder, deadline: float) -> Holder | None:
    """The lease of a dead holder, or None if there is no lease.

    Raises:
        ValueError: the holder is still alive at the deadline.
    """
    last, reported = _read(run), False
    while last is not None and not _is_dead(last):
        left = deadline - time.monotonic()
        if not reported and (left > 0 or _is_elsewhere(last)):
            what = f"{left:.0f} s for it to end" if left > 0 else f"{STALE_AFTER_S:.0f} s for it to renew its lease"
            print(f"{run}: held by {_name(last)}; waiting up to {what}", file=sys.stderr)
            reported = True
        if _is_elsewhere(last) and not _gives_sign(run, last):
            break
        if (now := _read(run)) is not None and time.monotonic() >= deadline:
            raise ValueError(_refusal(run, now))
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        last = _read(run)
    return last


def _is_elsewhere(holder: Holder) -> bool:
    """Whether its process cannot be checked from here; true for a damaged lease."""
    return holder.get("machine") != _machine() or not isinstance(holder.get("pid"), int)


def _is_dead(holder: Holder) -> bool:
    if _is_elsewhere(holder):
        return False
    started = _started(holder["pid"])
    return started is None or started != holder.get("started")


def _gives_sign(run: Folder, last: Holder) -> bool:
    """Whether the lease is renewed or released within `STALE_AFTER_S`."""
    give_up = time.monotonic() + STALE_AFTER_S
    while time.monotonic() < give_up:
        time.sleep(1)
        if _read(run) != last:
            return True
    return False


def _refusal(run: Folder, holder: Holder) -> str:
    return (
        f"{run} is in use by {_name(holder)}, and only one process may write there. Wait for it (--wait), end it, or "
        "choose another --name for a run, another --output for a study"
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
    except FileNotFoundError:  # released meanwhile
        return None
    return holder if isinstance(holder, dict) else {}


def _is(holder: Holder, other: Holder | None) -> bool:
    return other is not None and "token" in holder and other.get("token") == holder["token"]


def _machine() -> str:
    """Identifies the boot and the namespace of process ids, in which a process id is unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return uuid.uuid4().hex  # unlike any other


def _started(pid: int) -> str | None:
    """Start of a process in ticks since the boot, since process ids are reused; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


@contextmanager
def _locked(run: Folder) -> Iterator[bool]:
    """Lock the run directory, if the storage has locks; yields whether it is locked."""
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
