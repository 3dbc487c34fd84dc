"""An overloaded server takes as many requests as it answers in the time that they may take."""

import asyncio
import heapq

import pytest

pytest.importorskip("httptools")
pytest.importorskip("uvicorn")

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.serve.server import shedding as module
from jaxembed.serve.server.config import ServerConfig
from jaxembed.serve.server.shedding import LEAST, Shedding
from tests.serve.server.servers import run
from tests.serve.server.sockets import answer_of, serving_bundles
from tests.serve.server.test_http_protocol import PREDICT, connect_and_send

MOST = 512


class Simulation:
    """Requests that come at any times, and batches of what waits then, on a clock of its own.

    Args:
      batch: seconds that one of so many requests takes.
      may_take: of the model.
      wait: for others, before a batch begins.
      at_once: batches that may run at a time.
      most_in_one: requests of a batch.
      least: of the model.
    """

    def __init__(self, monkeypatch, batch, may_take=0.01, wait=0.0, at_once=1, most_in_one=256, least=LEAST):
        self._most_in_one = most_in_one
        self.now, self._batch, self._wait, self._at_once = 0.0, batch, wait, at_once
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        self.shedding = Shedding(lambda: may_take, MOST, least)
        self._events, self._number, self._waiting, self._running = [], 0, [], 0
        self.refused, self.taken = [], []

    def at(self, when, what, *arguments):
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, arguments))

    def run(self, until):
        while self._events and self._events[0][0] <= until:
            self.now, _, what, arguments = heapq.heappop(self._events)
            what(*arguments)
        self.now = until

    def arrive(self, then=None):
        """A request; `then` is called once it is answered (True) or refused."""
        if self.shedding.full(0):
            self.refused.append(self.now)
            if then is not None:
                then(False)
            return
        self.shedding.begin()
        self._waiting.append((self.now, then))
        self.at(self.now + self._wait, self._start)

    def client(self):
        """Sends one request after the other; a refused one again after 1 ms."""
        self.arrive(lambda answered: self.at(self.now + (1e-6 if answered else 1e-3), self.client))

    def open(self, rate, begin, end):
        for i in range(int((end - begin) * rate)):
            self.at(begin + i / rate, self.arrive)

    def _start(self):
        if self._running < self._at_once and self._waiting:
            batch, self._waiting = self._waiting[: self._most_in_one], self._waiting[self._most_in_one :]
            self._running += 1
            self.at(self.now + self._batch(len(batch)), self._end, batch)

    def _end(self, batch):
        self._running -= 1
        for arrived, then in batch:
            self.shedding.end(answered=True)
            self.taken.append((arrived, self.now - arrived))
            if then is not None:
                then(True)
        self._start()

    def longest(self, since):
        return max(seconds for arrived, seconds in self.taken if arrived >= since)


def by_loop(requests):
    """All of the time is for each request, as of small ones."""
    return 3e-4 * requests


def by_batch(requests):
    """Hardly any is."""
    return 0.05 + 1e-4 * requests


@pytest.mark.parametrize(
    ("batch", "may_take", "at_once", "best"),
    [(by_loop, 0.01, 1, 3333), (lambda n: 1e-3 + 3e-4 * n, 0.01, 2, 5500), (by_batch, 0.15, 1, 3000)],
)
def test_twice_the_load(monkeypatch, batch, may_take, at_once, best):
    """What is admitted takes about what it may, and hardly fewer are answered than can be."""
    server = Simulation(monkeypatch, batch, may_take, at_once=at_once)
    server.open(2 * best, 0, 5)
    server.run(5)
    assert server.longest(since=1) < 2.2 * may_take
    answered = sum(1 <= arrived < 4 for arrived, _ in server.taken) / 3
    assert answered > 0.8 * best
    # The load before and after it is what can be answered: nothing of it is refused once the queue is gone.
    server.refused.clear()
    server.open(0.5 * best, 5.1, 8)
    server.run(8)
    assert not server.refused


@pytest.mark.parametrize("batch", [by_loop, by_batch, lambda n: 2.0])
@pytest.mark.parametrize("clients", [1, 4, 8, 24])
def test_clients_that_wait_for_answers_are_not_refused(monkeypatch, batch, clients):
    """Neither from the beginning, nor as others come to a server that hardly pauses."""
    server = Simulation(monkeypatch, batch, may_take=max(0.01, 3 * batch(1)))
    server.client()
    for i in range(1, clients):
        server.at(2 + i * 1e-4, server.client)
    server.run(20)
    assert not server.refused
    assert server.longest(0) > 0


def test_more_clients_than_are_answered_in_time_are_refused(monkeypatch):
    server = Simulation(monkeypatch, by_loop)
    for _ in range(100):
        server.client()
    server.run(3)
    assert len(server.refused) > 1000
    assert server.longest(since=1) < 0.022
    assert len([0 for arrived, _ in server.taken if arrived >= 1]) > 0.9 * 2 / 3e-4


def test_a_wait_for_others_is_no_overload(monkeypatch):
    """Of a server that has hardly anything to do."""
    server = Simulation(monkeypatch, lambda n: 5e-4, may_take=0.03, wait=0.02)
    server.open(600, 0, 5)
    server.run(6)
    assert not server.refused


def test_a_long_request_beside_quick_ones_is_no_overload(monkeypatch):
    server = Simulation(monkeypatch, lambda n: 1e-3, at_once=2)
    server.open(40, 0, 5)
    long = server.shedding
    long.begin()
    server.run(4)
    for _ in range(50):
        server.at(4, server.arrive)
    server.run(5)
    long.end(answered=True)
    assert not server.refused


def test_batches_that_run_side_by_side_are_no_overload(monkeypatch):
    """Each of one request that takes longer than it may, of which as many run as there are cores."""
    server = Simulation(monkeypatch, lambda n: 0.012, may_take=0.005, at_once=16, most_in_one=1, least=2 * 16)
    server.open(900, 0, 5)
    server.run(6)
    assert not server.refused


def test_bursts_are_taken_again_though_there_is_no_pause(monkeypatch):
    """Of a server that has one long request after the other."""
    server = Simulation(monkeypatch, by_loop)
    server.shedding.begin()
    server.open(300, 0, 10)
    for _ in range(400):
        server.at(1, server.arrive)
    server.run(1.1)
    assert server.shedding.limit < 50
    for second in range(2, 10):
        for _ in range(60):
            server.at(second, server.arrive)
    server.run(10)
    assert not [at for at in server.refused if at > 1.5]


def test_bursts_are_taken(monkeypatch):
    """Right after a pause, which nothing tells the server of before they are there."""
    server = Simulation(monkeypatch, by_loop)
    server.open(8000, 0, 2)
    server.run(3)
    assert server.shedding.limit < 50
    server.refused.clear()
    for second in (100, 101, 102):
        for _ in range(150):
            server.at(second, server.arrive)
    server.run(104)
    assert not server.refused


def test_what_is_refused_after_it_was_read_is_no_answer(monkeypatch):
    """A flood of bad requests, each gone at once, does not make room for more."""
    server = Simulation(monkeypatch, by_loop)

    def bad():
        server.shedding.begin()
        server.shedding.end(answered=False)

    for i in range(40_000):
        server.at(i / 8000, bad)
    server.open(6000, 0, 5)
    server.run(5)
    assert server.shedding.limit <= 40


def test_what_waits_aside_takes_no_time_of_the_server(monkeypatch):
    """Requests whose bodies come slowly."""
    server = Simulation(monkeypatch, by_loop)
    for _ in range(2):
        server.shedding.begin()
    with server.shedding.aside(), server.shedding.aside():
        server.open(1000, 0, 2)
        server.run(2)
        assert server.shedding.limit == MOST
    assert server.shedding.under_way == 2


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "end", "leave", "aside", "full"]), st.floats(0, 2)), max_size=60
    ),
    st.integers(1, 50),
)
@settings(max_examples=100, deadline=None)
def test_the_limit_is_never_less_than_it_must_be_nor_more_than_there_is_room_for(steps, most):
    now = 0.0
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "monotonic", lambda: now)
        shedding = Shedding(lambda: 0.01, most)
        for step, pause in steps:
            now += pause
            if step == "full":
                assert shedding.full(0) == (shedding.under_way >= shedding.limit)
                assert shedding.under_way or not shedding.full(0)
            elif step == "begin" or not shedding.under_way:
                shedding.begin()
            elif step == "aside":
                with shedding.aside():
                    now += pause
            else:
                shedding.end(answered=step == "end")
            assert min(LEAST, most) <= shedding.limit <= most
            assert shedding.under_way >= 0


def test_the_server_refuses_what_is_over_the_limit(shared_folder):
    async def check():
        async with serving_bundles(shared_folder, max_queue_requests=64) as (port, service):

            async def ask():
                reader, writer = await connect_and_send(port, PREDICT)
                try:
                    return (await asyncio.wait_for(answer_of(reader), 20))[0]
                finally:
                    writer.close()

            with service.admission(), service.admission():
                service.shedding.limit = 2
                assert service.full
                assert await ask() == 429
                service.shedding.limit = 3
                assert await ask() == 200
                # A body that comes late keeps nobody out until it is there, and finds then what room there is.
                reader, writer = await connect_and_send(port, PREDICT[:-1])
                assert await ask() == 200
                service.shedding.limit = 2
                writer.write(PREDICT[-1:])
                assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 429
                writer.close()
            assert service.shedding.under_way == 0

    run(check())


@pytest.mark.parametrize("wait_ms", [0.0, 30.0])
def test_slow_models_and_waits_need_longer_queues(shared_folder, wait_ms, monkeypatch):
    async def check():
        async with serving_bundles(shared_folder, max_queue_ms=5.0, batch_wait_ms=wait_ms) as (_, service):
            for least, rows, queue in ((0.001, 1, 0.005), (0.1, 1, 0.3), (0.1, 7, 0.6), (0.1, 200, 0.6)):
                monkeypatch.setattr(service.batcher, "_seconds", {1: least, 4: 2 * least})
                monkeypatch.setattr(service.batcher, "_rows_each", rows)
                assert service._may_take() == pytest.approx(queue + wait_ms / 1e3)
            monkeypatch.setattr(service.batcher, "_seconds", {})
            assert service._may_take() == pytest.approx(0.005 + wait_ms / 1e3)

    run(check())


def test_more_batches_at_a_time_need_more_requests(shared_folder):
    async def check():
        for at_once, least in ((2, LEAST), (40, 80)):
            async with serving_bundles(shared_folder, batches_at_once=at_once) as (_, service):
                assert service.shedding._least == least

    run(check())


def test_what_batches_took_is_forgotten_with_their_version(shared_folder):
    async def check():
        async with serving_bundles(shared_folder) as (port, service):
            service.batcher._seconds[1] = 100.0
            reader, writer = await connect_and_send(port, PREDICT)
            assert (await asyncio.wait_for(answer_of(reader), 20))[0] == 200
            writer.close()
            assert 0 < service.batcher.seconds_alone < 100
            assert service.batcher._rows_each == 1

    run(check())


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "10", True])
def test_the_time_must_be_one(tmp_path, value):
    with pytest.raises(ValueError, match="max_queue_ms must be milliseconds above 0"):
        ServerConfig(str(tmp_path), max_queue_ms=value)
