"""The micro-batcher alone: which items are computed together, and who hears what."""

import asyncio
import threading

import pytest

from lamp_fast.serve.batching import Batcher, ClosedError, FullError


class Computer:
    """Doubles numbers, holds on a gate, and remembers its batches."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.begun = threading.Semaphore(0)
        self.gate.set()

    def __call__(self, question, items):
        self.batches.append((question, list(items)))
        self.begun.release()
        assert self.gate.wait(20)
        if "bad" in items:
            raise ValueError("a bad item")
        return [2 * each for each in items]

    async def busy(self, batcher):
        """Keep the thread at a first item of its own; what comes then has to gather."""
        self.gate.clear()
        first = asyncio.create_task(batcher.ask("first", [0]))
        await asyncio.to_thread(self.begun.acquire)
        return first


def run(steps, **options):
    """``steps`` of a batcher and its computer, in an event loop."""
    computer = Computer()
    sizes = []

    async def main():
        options.setdefault("observe", lambda size, seconds: sizes.append(size))
        settings = {"size": 4, "wait": 0.0, "capacity": 8, **options}
        async with Batcher(computer, **settings) as batcher:
            try:
                await asyncio.wait_for(steps(batcher, computer), 20)
            finally:
                computer.gate.set()

    asyncio.run(main())
    assert sizes == [len(items) for _, items in computer.batches]
    return computer.batches


async def gathered(batcher, *calls):
    tasks = [asyncio.create_task(batcher.ask(*call)) for call in calls]
    await asyncio.sleep(0)
    return tasks


def test_what_gathers_is_one_batch_and_answers_find_their_way():
    async def steps(batcher, computer):
        first = await computer.busy(batcher)
        tasks = await gathered(batcher, ("q", [1]), ("q", [2, 3]), ("q", [4, 5]))
        assert batcher.waiting == 5
        computer.gate.set()
        assert await first == [0]
        assert await asyncio.gather(*tasks) == [[2], [4, 6], [8, 10]]
        assert batcher.waiting == 0

    assert run(steps)[1:] == [("q", [1, 2, 3, 4]), ("q", [5])]


def test_others_are_waited_for():
    """The time is never over here, so that only a full batch ends the waiting."""

    async def steps(batcher, computer):
        tasks = await gathered(batcher, ("q", [1]), ("q", [2]), ("q", [3]))
        await asyncio.sleep(0.05)
        assert not computer.batches
        tasks += await gathered(batcher, ("q", [4]))
        assert await asyncio.gather(*tasks) == [[2], [4], [6], [8]]

    assert run(steps, wait=1e6) == [("q", [1, 2, 3, 4])]


def test_one_alone_does_not_wait_for_ever():
    async def steps(batcher, computer):
        assert await batcher.ask("q", [1]) == [2]

    assert run(steps, wait=0.01) == [("q", [1])]


def test_other_questions_are_other_batches_and_the_oldest_goes_first():
    async def steps(batcher, computer):
        await computer.busy(batcher)
        tasks = await gathered(batcher, ("a", [1]), ("b", [2]), ("a", [3]))
        computer.gate.set()
        assert await asyncio.gather(*tasks) == [[2], [4], [6]]

    assert run(steps)[1:] == [("a", [1, 3]), ("b", [2])]


def test_all_are_taken_or_none():
    async def steps(batcher, computer):
        await computer.busy(batcher)
        tasks = await gathered(batcher, ("q", [1, 2, 3, 4, 5]))
        with pytest.raises(FullError) as full:
            await batcher.ask("q", [6, 7, 8, 9])
        assert full.value.retry_after >= 1
        tasks += await gathered(batcher, ("q", [6, 7, 8]))
        computer.gate.set()
        assert await asyncio.gather(*tasks) == [[2, 4, 6, 8, 10], [12, 14, 16]]

    assert sum(len(items) for _, items in run(steps)) == 9


def test_an_error_goes_to_its_batch_alone():
    async def steps(batcher, computer):
        await computer.busy(batcher)
        bad = await gathered(batcher, ("a", [1]), ("a", ["bad"]))
        good = await gathered(batcher, ("b", [2]))
        computer.gate.set()
        outcomes = await asyncio.gather(*bad, *good, return_exceptions=True)
        assert [type(each) for each in outcomes] == [ValueError, ValueError, list]
        assert await batcher.ask("a", [3]) == [6]

    run(steps)


def test_answers_that_are_too_few_are_an_error():
    async def main():
        async with Batcher(lambda q, items: items[1:], size=2, wait=0, capacity=2) as batcher:
            with pytest.raises(ValueError, match="zip"):
                await batcher.ask("q", [1, 2])

    asyncio.run(main())


def test_who_gives_up_is_not_computed():
    async def steps(batcher, computer):
        await computer.busy(batcher)
        gone, kept = await gathered(batcher, ("q", [1, 2]), ("q", [3]))
        gone.cancel()
        await asyncio.sleep(0)
        computer.gate.set()
        assert await kept == [6]
        gone, _ = await gathered(batcher, ("q", [4]), ("r", []))
        gone.cancel()
        assert await batcher.ask("q", [5]) == [10]

    assert [items for _, items in run(steps)[1:]] == [[3], [5]]


def test_at_the_end_who_waits_is_answered_and_nobody_else():
    async def steps(batcher, computer):
        first = await computer.busy(batcher)
        tasks = await gathered(batcher, ("q", [1]), ("r", [2]))
        closing = asyncio.create_task(batcher.__aexit__())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await batcher.ask("q", [3])
        computer.gate.set()
        await closing
        assert await asyncio.gather(first, *tasks) == [[0], [2], [4]]

    assert run(steps)[1:] == [("q", [1]), ("r", [2])]


def test_at_the_end_nobody_waits_for_others():
    async def steps(batcher, computer):
        (task,) = await gathered(batcher, ("q", [1]))
        await batcher.__aexit__()
        assert await task == [2]

    run(steps, wait=1e6)
