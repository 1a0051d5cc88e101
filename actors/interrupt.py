"""Shutdown by Ctrl-C and SIGTERM: a run ends after the running update, and saves its work."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from g2rpo_ray.exits import RunInterrupted, sigterm_as_interrupt

T = TypeVar("T")


class Interrupted(Exception):
    """A shutdown was requested. `stuck`: the running call did not finish in time."""

    def __init__(self, stuck: bool = False):
        self.stuck = stuck


class Interrupt:
    """The first signal requests a shutdown; the second cancels the task that called `begin`."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None

    def begin(self) -> None:
        """Called inside the event loop, by the task that a second signal cancels."""
        self._task = asyncio.current_task()

    def ask(self, *_: object) -> None:
        """Handle a signal, in any thread."""
        if self._task is None:
            self._asked.set()
        else:
            with suppress(RuntimeError):  # the loop has ended
                self._task.get_loop().call_soon_threadsafe(self._on_signal)

    def __bool__(self) -> bool:
        """True after the first SIGINT or SIGTERM."""
        return self._asked.is_set()

    async def unless(self, work: Awaitable[T]) -> T | None:
        """The result of `work`; None if a shutdown is requested before it is finished, which cancels it."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((task, asked), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            asked.cancel()

    async def finish(self, work: Awaitable[T], grace_s: Callable[[], float]) -> T:
        """The result of `work`, which after a signal has `grace_s()` more seconds to finish.

        Raises:
            Interrupted: it did not finish in time.
        """
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((task, asked), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await asyncio.wait((task,), timeout=grace_s())
            if not task.done():
                raise Interrupted(stuck=True)
            return task.result()
        finally:
            task.cancel()
            asked.cancel()

    def _on_signal(self) -> None:
        if self and self._task:
            self._task.cancel()
        self._asked.set()


def run_interruptible(work: Callable[[Interrupt], Coroutine[Any, Any, T]]) -> T:
    """The result of `work`, run in an event loop of its own, which SIGINT and SIGTERM interrupt.

    If a loop is already running, as in a notebook, the new loop runs in another thread, and this thread waits.

    Raises:
        RunInterrupted: a second signal cancelled it.
    """
    interrupt = Interrupt()

    async def begun() -> T:
        interrupt.begin()
        return await work(interrupt)

    with sigterm_as_interrupt(interrupt.ask):
        try:
            if not _in_a_loop():
                return asyncio.run(begun())
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(lambda: asyncio.run(begun())).result()
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise RunInterrupted from None


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
