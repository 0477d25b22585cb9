"""Items that arrive close together are computed together: asyncio, and one thread that computes."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Question = TypeVar("Question", bound=Hashable)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class FullError(Exception):
    """As many items wait as may.

    Attributes:
        retry_after: whole seconds until there should be room, at least 1.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many pictures are waiting")
        self.retry_after = retry_after


class ClosedError(Exception):
    """Nothing more is taken."""


@dataclass
class _Waiting(Generic[Question, Item, Answer]):
    question: Question
    item: Item
    answer: "asyncio.Future[Answer]"
    since: float


class Batcher(Generic[Question, Item, Answer]):
    """Collects items and computes them in batches; used in one event loop, as ``async with``.

    An item waits for others until ``wait`` is over or there are ``size`` of them. Then it is
    computed with the oldest of those that ask the same; while a batch is computed the next one
    gathers. At the end of the ``async with`` what waits is still answered.

    Args:
        compute: a question and 1 to ``size`` items to as many answers, called in one thread. What
            it raises goes to everyone who waits for that batch.
        size: items a batch at most.
        wait: seconds.
        capacity: items that may wait, besides those that are computed.
        observe: told the size of each batch and the seconds that it took.
    """

    def __init__(
        self,
        compute: Callable[[Question, list[Item]], Sequence[Answer]],
        *,
        size: int,
        wait: float,
        capacity: int,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._compute, self._observe = compute, observe
        self._size, self._wait, self._capacity = size, wait, capacity
        self._waiting: deque[_Waiting[Question, Item, Answer]] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._seconds = 0.0

    @property
    def waiting(self) -> int:
        """How many items wait to be computed."""
        return len(self._waiting)

    async def __aenter__(self) -> "Batcher[Question, Item, Answer]":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._closed = True
        self._changed.set()
        try:
            await self._running
        finally:
            self._thread.shutdown(cancel_futures=True)

    def check_room(self, count: int) -> None:
        """Refuse items that would not be taken now.

        Raises:
            FullError: with them more would wait than may.
            ClosedError: the ``async with`` is at its end.
        """
        if self._closed:
            raise ClosedError
        if len(self._waiting) + count > self._capacity:
            batches = math.ceil(len(self._waiting) / self._size)
            raise FullError(max(1, math.ceil(batches * self._seconds)))

    async def ask(self, question: Question, items: Sequence[Item]) -> list[Answer]:
        """The answers to some items, in order; all of them are taken, or none.

        Raises:
            FullError, ClosedError: see :meth:`check_room`.
        """
        self.check_room(len(items))
        loop = asyncio.get_running_loop()
        mine = [_Waiting(question, each, loop.create_future(), loop.time()) for each in items]
        self._waiting.extend(mine)
        self._changed.set()
        # Whoever gives up waiting cancels the futures, and such items are not computed.
        return await asyncio.gather(*(each.answer for each in mine))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while await self._gathered():
            batch = self._take()
            if not batch:
                continue
            begun = time.monotonic()
            try:
                answers = await loop.run_in_executor(
                    self._thread, self._compute, batch[0].question, [each.item for each in batch]
                )
                pairs = list(zip(batch, answers, strict=True))
            except Exception as error:
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)
            else:
                for each, answer in pairs:
                    if not each.answer.done():
                        each.answer.set_result(answer)
            self._seconds = time.monotonic() - begun
            self._observe(len(batch), self._seconds)

    async def _gathered(self) -> bool:
        """Wait until a batch is due; False once there will be none."""
        while not self._waiting:
            if self._closed:
                return False
            self._changed.clear()
            await self._changed.wait()
        loop = asyncio.get_running_loop()
        due = self._waiting[0].since + self._wait
        while len(self._waiting) < self._size and not self._closed:
            left = due - loop.time()
            if left <= 0:
                break
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return True

    def _take(self) -> list[_Waiting[Question, Item, Answer]]:
        """The next batch, out of what waits; none where all have given up."""
        wanted = [each for each in self._waiting if not each.answer.done()]
        batch = [each for each in wanted if each.question == wanted[0].question][: self._size]
        taken = set(map(id, batch))
        self._waiting = deque(each for each in wanted if id(each) not in taken)
        return batch
