"""Ctrl-C and SIGTERM: a run ends at the next safe place, with its work saved."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Interrupted(Exception):
    """Somebody asked to end. `stuck`: what was under way then did not come to an end."""

    def __init__(self, stuck: bool = False):
        self.stuck = stuck


class Interrupt:
    """Made inside the running event loop. The first signal asks to end; the second cancels the task that made this."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def __bool__(self) -> bool:
        """Whether somebody asked to end."""
        return self._asked.is_set()

    async def unless(self, work: Awaitable[T]) -> T | None:
        """The result of `work`; None, and `work` cancelled, if somebody asks to end before it is done."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((task, asked), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            asked.cancel()

    async def finish(self, work: Awaitable[T], grace_s: Callable[[], float]) -> T:
        """The result of `work`, which is finished, in a while, even if somebody asks to end.

        Raises:
            Interrupted: it was not.
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
