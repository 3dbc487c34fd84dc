"""Batching: who runs with whom, when, and who does not run at all."""

import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest

from jaxembed.serve.packing import Packed
from jaxembed.serve.rows import Rows
from jaxembed.serve.server.batcher import Batcher
from jaxembed.serve.server.errors import RequestError
from jaxembed.serve.server.metrics import Metrics
from tests.serve.server.servers import LOOPS, on, run, until


class Model:
    """Answers each row with its number; `gate` holds it until it is set."""

    def __init__(self):
        self.batches, self.gate, self.error, self.threads = [], threading.Event(), None, []
        self.gate.set()

    def run(self, parts):
        self.gate.wait(30)
        if self.error:
            raise self.error
        self.batches.append([int(part.dense[0][0]) for part in parts])
        self.threads.append(threading.current_thread() is threading.main_thread())
        return [np.concatenate([part.dense[0] for part in parts])], sum(map(len, parts))


def rows(number, count=1):
    packed = Packed(count, np.zeros(0, np.int32), np.zeros((1, count + 1), np.int32), None)
    return Rows(packed, [np.full(count, number, np.float32)])


async def started(max_rows=4, wait=0.0, max_queued=100, at_once=1):
    batcher = Batcher(max_rows, wait, max_queued, Metrics(), at_once)
    batcher.start()
    return batcher


def soon(seconds=20.0):
    return asyncio.get_running_loop().time() + seconds


async def settle():
    for _ in range(5):
        await asyncio.sleep(0.01)


def test_what_arrives_while_one_runs_runs_together():
    async def check():
        model, batcher = Model(), await started()
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(model, rows(0), soon()))]
        await settle()
        tasks += [asyncio.create_task(batcher.submit(model, rows(i), soon())) for i in range(1, 7)]
        await settle()
        model.gate.set()
        results = await asyncio.gather(*tasks)
        assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert [int(result[0][0]) for result in results] == list(range(7))
        assert batcher.queued_rows == 0
        await batcher.stop()

    run(check())


def test_one_version_a_batch_and_large_requests_alone():
    async def check():
        one, other, batcher = Model(), Model(), await started(max_rows=5)
        one.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(one, rows(0), soon()))]
        await settle()
        order = [(one, 1, 1), (other, 2, 1), (other, 3, 2), (other, 4, 9), (other, 5, 1), (other, 6, 3)]
        tasks += [asyncio.create_task(batcher.submit(m, rows(i, n), soon())) for m, i, n in order]
        await settle()
        one.gate.set()
        results = await asyncio.gather(*tasks)
        # The loop may run a quick batch by itself before the thread begins the one that it was given.
        assert (one.batches, sorted(other.batches)) == ([[0], [1]], [[2, 3], [4], [5], [6]])
        assert other.batches[0] == [2, 3]
        assert results[4][0].tolist() == [4.0] * 9
        await batcher.stop()

    run(check())


def test_what_waits_is_divided_among_idle_threads():
    async def check():
        model, batcher = Model(), await started(max_rows=100, at_once=2)
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(model, rows(i, 10), soon())) for i in range(6)]
        await settle()
        tasks += [asyncio.create_task(batcher.submit(model, rows(i, 10), soon())) for i in range(6, 9)]
        await settle()
        assert batcher.queued_rows == 90
        model.gate.set()
        results = await asyncio.gather(*tasks)
        assert sorted(model.batches)[:2] == [[0, 1, 2], [3, 4, 5]]
        assert [result[0].tolist() for result in results] == [[i] * 10 for i in range(9)]
        await batcher.stop()

    run(check())


def test_no_more_run_at_once_than_may():
    async def check():
        model, batcher = Model(), await started(max_rows=4, at_once=3)
        entered, most, lock = 0, 0, threading.Lock()
        whole = model.run

        def counted(parts):
            nonlocal entered, most
            with lock:
                entered += 1
                most = max(most, entered)
            time.sleep(0.005)
            with lock:
                entered -= 1
            return whole(parts)

        model.run = counted
        tasks = [asyncio.create_task(batcher.submit(model, rows(i, 2), soon())) for i in range(40)]
        results = await asyncio.gather(*tasks)
        assert most == 3
        assert [result[0].tolist() for result in results] == [[i] * 2 for i in range(40)]
        await batcher.stop()

    run(check())


def test_what_expires_once_it_is_ready_never_runs():
    async def check():
        model, batcher = Model(), await started()
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(model, rows(0), soon()))
        await settle()
        late = asyncio.create_task(batcher.submit(model, rows(1, 4), soon(0.05)))
        gone = asyncio.create_task(batcher.submit(model, rows(2, 4), soon()))
        await settle()
        assert batcher._under_way == 2  # `late` is ready
        with pytest.raises(RequestError, match="it was not run"):
            await late
        gone.cancel()
        await settle()
        model.gate.set()
        await first
        assert await until(lambda: batcher.queued_rows == 0)
        assert model.batches == [[0]]
        await batcher.stop()

    run(check())


def test_stopping_refuses_what_waits_and_answers_what_is_under_way():
    async def check():
        model, batcher = Model(), await started(at_once=2)
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(model, rows(i, 4), soon())) for i in range(5)]
        await settle()
        stopping = asyncio.create_task(batcher.stop())
        await settle()
        assert not stopping.done()
        model.gate.set()
        await asyncio.wait_for(stopping, 10)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [result[0].tolist() for result in results[:3]] == [[i] * 4 for i in range(3)]
        assert [result.status for result in results[3:]] == [503, 503]
        assert not [t for t in threading.enumerate() if t.name.startswith("jaxembed-run")]

    run(check())


@LOOPS
def test_wait_gathers_within_its_bound(loop):
    async def check():
        model, batcher = Model(), await started(max_rows=3, wait=3600)
        # Full before its time, which no test has.
        await asyncio.gather(*(batcher.submit(model, rows(i), soon()) for i in range(3)))
        assert model.batches == [[0, 1, 2]]
        await batcher.stop()
        batcher = await started(max_rows=3, wait=0.2)
        begin = time.monotonic()
        await batcher.submit(model, rows(3), soon())
        assert time.monotonic() - begin > 0.15
        assert model.batches[1:] == [[3]]
        await batcher.stop()

    on(loop, check())


def test_who_nobody_waits_for_leaves_room():
    """While a long batch runs, requests that gave up keep no other from waiting."""

    async def check():
        model, batcher = Model(), await started(max_rows=100, max_queued=5)
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(model, rows(0), soon()))
        await settle()
        late = [asyncio.create_task(batcher.submit(model, rows(1), soon(0.02))) for _ in range(2)]
        gone = [asyncio.create_task(batcher.submit(model, rows(2), soon())) for _ in range(2)]
        await settle()
        for task in gone:
            task.cancel()
        done = await asyncio.gather(*late, *gone, return_exceptions=True)
        assert [type(outcome) for outcome in done] == 2 * [RequestError] + 2 * [asyncio.CancelledError]
        assert batcher.queued_rows == 1
        last = [asyncio.create_task(batcher.submit(model, rows(3), soon())) for _ in range(4)]
        await settle()
        assert batcher.queued_rows == 5
        model.gate.set()
        await asyncio.gather(first, *last)
        assert model.batches == [[0], [3, 3, 3, 3]]
        assert batcher.queued_rows == 0
        await batcher.stop()

    run(check())


def test_a_model_that_serves_no_more_is_let_go():
    """With its tables, whether others ran meanwhile or not."""

    async def check():
        model, batcher = Model(), await started()
        await batcher.submit(model, rows(0), soon())
        kept = weakref.ref(model)
        del model
        await settle()
        gc.collect()
        assert kept() is None
        assert batcher.seconds_alone > 0
        await batcher.submit(Model(), rows(0), soon())
        await batcher.stop()

    run(check())


def test_expired_and_abandoned_requests_never_run():
    async def check():
        model, batcher = Model(), await started()
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(model, rows(0), soon()))
        await settle()
        late = asyncio.create_task(batcher.submit(model, rows(1), soon(0.02)))
        gone = asyncio.create_task(batcher.submit(model, rows(2), soon()))
        last = asyncio.create_task(batcher.submit(model, rows(3), soon()))
        await settle()
        gone.cancel()
        with pytest.raises(RequestError, match="it was not run") as caught:
            await late
        assert caught.value.status == 504
        model.gate.set()
        await asyncio.gather(first, last)
        assert model.batches == [[0], [3]]
        assert batcher.queued_rows == 0
        await batcher.stop()

    run(check())


def test_a_deadline_that_passes_while_it_runs():
    async def check():
        model, batcher = Model(), await started()
        model.gate.clear()
        with pytest.raises(RequestError, match="passed while it ran") as caught:
            await batcher.submit(model, rows(0), soon(0.1))
        assert caught.value.status == 504
        assert "not run" not in caught.value.message
        model.gate.set()
        await settle()
        assert model.batches == [[0]]
        await batcher.stop()

    run(check())


def test_full_queue_refuses_at_once():
    async def check():
        model, batcher = Model(), await started(max_queued=3)
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(model, rows(i), soon())) for i in range(3)]
        await settle()
        with pytest.raises(RequestError, match="overloaded") as caught:
            await batcher.submit(model, rows(4), soon())
        assert (caught.value.status, caught.value.retry_after) == (429, 1)
        model.gate.set()
        await asyncio.gather(*tasks)
        await batcher.submit(model, rows(5, 3), soon())
        await batcher.stop()

    run(check())


def test_too_many_rows_are_refused_for_good_whether_others_run_or_not():
    async def check():
        model, batcher = Model(), await started(max_queued=3)
        for busy in (False, True):
            if busy:
                model.gate.clear()
                task = asyncio.create_task(batcher.submit(model, rows(0), soon()))
                await settle()
            with pytest.raises(RequestError, match="at most 3 rows, got 4") as caught:
                await batcher.submit(model, rows(1, 4), soon())
            assert (caught.value.status, caught.value.retry_after) == (413, None)
        model.gate.set()
        await task
        await batcher.stop()

    run(check())


def test_a_failing_model_fails_its_batch_and_nothing_else():
    async def check():
        model, batcher = Model(), await started()
        model.error = RuntimeError("secret path")
        with pytest.raises(RequestError, match="the model failed: RuntimeError; see the log") as caught:
            await batcher.submit(model, rows(0), soon())
        assert caught.value.status == 503
        model.error = None
        assert (await batcher.submit(model, rows(1), soon()))[0].tolist() == [1.0]
        await batcher.stop()

    run(check())


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_threads_that_cannot_be_started(monkeypatch, error):
    """Those that there are run the batches; without any, requests are refused, and nothing is kept of them."""
    lacking, said = True, []
    begin = threading.Thread.start

    def start(thread):
        if lacking:
            raise error
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr("jaxembed.serve.server.batcher._RETRY_SECONDS", 60.0)

    async def check():
        nonlocal lacking
        model, batcher = Model(), await started(at_once=2)
        monkeypatch.setattr(batcher._metrics.log, "error", lambda message, extra: said.append(extra["reason"]))
        tasks = [asyncio.create_task(batcher.submit(model, rows(i, 4), soon())) for i in range(3)]
        for task in tasks:
            with pytest.raises(RequestError, match="no thread to run them") as caught:
                await task
            assert (caught.value.status, caught.value.retry_after) == (503, 1)
        assert (batcher.queued_rows, model.batches) == (0, [])
        assert said == [str(error) or "MemoryError"]
        lacking = False
        assert (await batcher.submit(model, rows(3), soon()))[0].tolist() == [3.0]
        lacking = True
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(model, rows(i, 4), soon())) for i in range(4, 7)]
        await settle()
        model.gate.set()
        assert [result[0][0] for result in await asyncio.gather(*tasks)] == [4.0, 5.0, 6.0]
        assert batcher.queued_rows == 0
        await batcher.stop()

    run(check())


def test_quick_batches_run_in_the_loop_unless_others_would_come_meanwhile():
    async def check():
        model, batcher = Model(), await started()

        async def submit(count, accepted_slowly):
            model.threads.clear()
            for i in range(count):
                await batcher.submit(model, rows(i), soon(), accepted_slowly)
            return model.threads.count(True)

        await submit(1, False)  # now it is known to be quick
        assert await submit(32, False) == 32
        assert await submit(32, True) == 30  # and two to see whether others come
        for _ in range(3):
            model.gate.clear()
            batcher._seconds.clear()
            tasks = [asyncio.create_task(batcher.submit(model, rows(0), soon(), True))]
            await settle()
            tasks += [asyncio.create_task(batcher.submit(model, rows(i), soon(), True)) for i in range(1, 4)]
            await settle()
            model.gate.set()
            await asyncio.gather(*tasks)
        assert await submit(8, True) == 0
        assert await submit(8, False) == 8
        await submit(64, True)
        assert await submit(32, True) == 30  # alone again
        await batcher.stop()

    run(check())


@pytest.mark.parametrize(
    ("requests", "seconds", "inline"),
    [
        (1, 0.0009, True),
        (1, 0.0011, False),  # there is nothing else that the loop would do meanwhile
        (12, 0.002, True),
        (12, 0.0027, False),
        (40, 0.0027, True),
        (40, 0.0035, False),  # too long for whoever else waits for the loop
    ],
)
def test_batches_that_take_less_than_their_requests_run_in_the_loop_and_whole(requests, seconds, inline):
    async def check():
        model, batcher = Model(), await started(max_rows=100, at_once=2)
        batcher._model, batcher._seconds = lambda: model, dict.fromkeys(range(8), seconds)
        if not inline:  # or one that has ended shows how quick they are
            model.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(model, rows(i), soon())) for i in range(requests)]
        await settle()
        model.gate.set()
        await asyncio.gather(*tasks)
        assert model.threads == [True] if inline else True not in model.threads
        if inline:
            assert model.batches == [list(range(requests))]
        await batcher.stop()

    run(check())
