"""Whose turn it is: within a priority tenants share what is served, whatever each one asks for."""

from __future__ import annotations

import pytest
from nanoinfer_engine.core import queue as waiting
from nanoinfer_engine.core.queue import WaitingQueue
from nanoinfer_engine.core.request import Request

from tests.engine.control.bench import Bench
from tests.engine.fakes import expected_tokens, make_request


@pytest.mark.matrix("R50")
def test_a_newcomer_does_not_stand_behind_a_flood() -> None:
    bench = Bench(max_batch_requests=1)
    flood = [make_request([11] * 8, 8, tenant="flood") for _ in range(20)]
    bench.add(*flood)
    for _ in range(30):
        bench.step()
    other = make_request([12] * 8, 8, tenant="other")
    bench.add(other)
    ended = [output.request for output in bench.run() if output.finish_reason]
    assert ended.index(other) == 1  # after the one that ran


def test_two_tenants_with_a_backlog_are_served_alike_in_tokens() -> None:
    bench = Bench(max_batch_requests=2)
    long = [make_request([11 + i] * 12, 20, tenant="long") for i in range(12)]
    short = [make_request([51 + i] * 2, 6, tenant="short") for i in range(60)]
    bench.add(*long, *short)
    for _ in range(150):
        bench.step()

    def served(requests: list[Request]) -> int:
        started = [r for r in requests if r.times.scheduled is not None]
        return sum(len(r.prompt_token_ids) + len(r.completion_token_ids) for r in started)

    assert served(long) + served(short) > 300
    assert abs(served(long) - served(short)) <= 2 * 32  # two of the longest requests
    bench.run()
    for request in (*long, *short):
        prompt, most = request.prompt_token_ids, request.stopping.max_tokens
        assert request.completion_token_ids == expected_tokens(prompt, most)


def test_nobody_saves_turns_up() -> None:
    bench = Bench(max_batch_requests=1)
    bench.add(make_request(max_tokens=1, tenant="idle"))
    bench.run()
    bench.add(*(make_request([11] * 8, 8, tenant="busy") for _ in range(20)))
    for _ in range(100):
        bench.step()
    bench.add(*(make_request([12] * 8, 8, tenant="idle") for _ in range(20)))
    outputs = [bench.step() for _ in range(100)]
    ended = [o.request.tenant for step in outputs for o in step if o.finish_reason]
    assert abs(ended.count("idle") - ended.count("busy")) <= 2


def test_priority_comes_before_fairness_and_arrival_after_it() -> None:
    queue = WaitingQueue()
    requests = [
        make_request(priority=0, tenant="a"),
        make_request(priority=0, tenant="a"),
        make_request(priority=0, tenant="b"),
        make_request(priority=1, tenant="a"),
    ]
    for number, request in enumerate(requests):
        request.arrival_number = number
        queue.add(request)
    order = []
    while queue:
        request = queue.first
        queue.take(request)
        queue.charge(request, 10)
        order.append(requests.index(request))
    assert order == [3, 0, 2, 1]


def test_the_cache_is_free_and_what_is_computed_is_paid() -> None:
    bench = Bench(max_batch_requests=1)
    bench.add(make_request([11] * 40, 1, tenant="a"), make_request([12] * 40, 1, tenant="b"))
    bench.run()
    again = [make_request([11] * 40, 1, tenant="a") for _ in range(4)]
    fresh = [make_request([20 + i] * 40, 1, tenant="b") for i in range(4)]
    bench.add(*again, *fresh)
    ended = [o.request.tenant for o in bench.run() if o.finish_reason]
    assert ended == ["a", "b", "a", "a", "a", "b", "b", "b"]


def test_the_queue_counts_what_it_holds() -> None:
    queue = WaitingQueue()
    first, second = make_request([11] * 3, num_bytes=7), make_request([11] * 4, num_bytes=5)
    second.arrival_number = 1
    queue.add(first)
    queue.add(second)
    assert (len(queue), queue.num_prompt_tokens, queue.num_bytes) == (2, 7, 12)
    assert list(queue) == [first, second]
    queue.remove(first)
    assert (len(queue), queue.num_prompt_tokens, queue.num_bytes) == (1, 4, 5)
    assert first not in queue
    assert second in queue


def test_counters_of_tenants_that_left_do_not_pile_up() -> None:
    queue = WaitingQueue()
    for number in range(3 * waiting.MAX_COUNTERS):
        request = make_request(tenant=str(number))
        queue.add(request)
        queue.take(request)
        queue.charge(request, 5)
    assert len(queue._served) <= waiting.MAX_COUNTERS + 1


def waiting_queue(**served: int) -> tuple[WaitingQueue, dict[str, Request]]:
    """A request of each tenant, which has been served so much; all wait for the first time."""
    queue, requests = WaitingQueue(), {}
    for number, (tenant, num_tokens) in enumerate(served.items()):
        requests[tenant] = make_request(tenant=tenant)
        requests[tenant].arrival_number = number
        queue.add(requests[tenant])
        queue.charge(requests[tenant], num_tokens)
    return queue, requests


def test_a_request_that_ran_before_starts_before_fairness_is_asked() -> None:
    queue, requests = waiting_queue(idle=0, busy=1000)
    assert queue.first is requests["idle"]
    requests["busy"].times.scheduled = 1  # preempted: what it computed would be lost twice
    assert queue.first is requests["busy"]


def test_the_level_of_newcomers_does_not_fall_when_one_with_less_is_served() -> None:
    queue, requests = waiting_queue(busy=500, idle=0)
    requests["busy"].times.scheduled = 1
    queue.take(requests["busy"])
    queue.take(requests["idle"])  # waited all along, at a lower level
    again, newcomer = make_request(tenant="busy"), make_request(tenant="newcomer")
    again.arrival_number, newcomer.arrival_number = 5, 6
    queue.add(again)
    queue.add(newcomer)
    assert queue.first is again
