"""A pool without Ray: an event loop whose time passes at once, and actors that are ordinary asyncio objects."""

import asyncio
import itertools
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import ActorDiedError

from g2rpo_ray.types import Place


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where nothing is ready, time jumps to the next timer."""

    def __init__(self):
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self):
        return self.now


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop):
        super().__init__()
        self._loop = loop

    def select(self, timeout=None):
        assert timeout is not None, "everybody waits, and no timer is set"
        self._loop.now += max(0.0, timeout)
        return super().select(0)


def use(pool, body: Callable[[], Awaitable[Any]], loop_factory=VirtualLoop) -> Any:
    """Run `body` while the pool serves, in virtual time by default; an exception group of one is raised as its own."""

    async def main():
        async with asyncio.TaskGroup() as group:
            pool.start(group)
            try:
                return await body()
            finally:
                pool.stop()

    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(main())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def no_news(needs):
    """Where a pool asks what the cluster has."""
    return "nothing is known"


class FakeActor:
    """Does its calls one after the other. A subclass adds methods; what they raise their callers get."""

    start_s = 1.0
    node = "node"
    pids = itertools.count(1)

    def __init__(self, name: str):
        self.name, self.ended = name, False
        self._place = Place(next(self.pids), self.node, "address")
        self.waiting: set[asyncio.Future] = set()
        self._tasks: set[asyncio.Task] = set()
        self._turn = asyncio.Lock()

    async def where(self, code: str) -> Place:
        return self._place

    async def ready(self) -> Place:
        await asyncio.sleep(self.start_s)
        return self._place

    def call(self, method: str, *args: Any) -> list[Any]:
        answer = asyncio.get_running_loop().create_future()
        if self.ended:
            answer.set_exception(ActorDiedError())
            return [answer]
        self.waiting.add(answer)
        self._tasks.add(asyncio.ensure_future(self._do(answer, getattr(self, method), args)))
        return [answer]

    async def _do(self, answer, method, args):
        found = error = None
        try:
            async with self._turn:
                found = await method(*args)
        except Exception as raised:
            error = raised
        self.waiting.discard(answer)
        _settle(answer, found, error)

    def end(self, error: Exception | None = None) -> None:
        """End it, as by a kill or a death of its own."""
        self.ended = True
        for task in self._tasks:
            task.cancel()
        for answer in self.waiting:
            _settle(answer, None, error or ActorDiedError())


def _settle(answer, found, error):
    if not answer.done():  # nobody waits for it any more
        answer.set_exception(error) if error else answer.set_result(found)
