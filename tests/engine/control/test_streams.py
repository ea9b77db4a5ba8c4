"""The pace of messages: what comes at once, what waits, and that nothing is lost or overtaken."""

from __future__ import annotations

import asyncio

from nanoinfer_engine.errors import EngineLostError
from nanoinfer_engine.request import FinishReason, Request, RequestOutput, SampledToken
from nanoinfer_engine.stream import Streams
from nanoinfer_engine.watchdog import Patience

from tests.engine.fakes import make_request


def make_streams(max_messages_per_second: float) -> Streams:
    return Streams(lambda *_: None, Patience(), max_messages_per_second)


def output(request: Request, *ids: int, finish_reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request, tuple(map(SampledToken, ids)), finish_reason)


def ids(outputs: list[RequestOutput]) -> list[int]:
    return [token.token_id for each in outputs for token in each.tokens]


async def test_first_tokens_never_wait_and_others_do() -> None:
    streams = make_streams(1.0)
    early, late = make_request(), make_request()
    one, two = streams.open([early]), streams.open([late])
    streams.deliver([output(early, 1)])
    assert ids(one.take()) == [1]
    streams.deliver([output(early, 2)])  # nothing has been paced before
    assert ids(one.take()) == [2]
    streams.deliver([output(early, 3), output(late, 10)])
    streams.deliver([output(early, 4), output(late, 11)])
    assert ids(one.take()) == []
    assert ids(two.take()) == [10]


async def test_what_waited_comes_together_when_it_is_due() -> None:
    streams = make_streams(40.0)
    first, second = make_request(), make_request()
    one, two = streams.open([first]), streams.open([second])
    streams.deliver([output(first, 1), output(second, 1)])
    streams.deliver([output(first, 2), output(second, 2)])
    released = asyncio.get_running_loop().time()
    one.take()
    two.take()
    for number in range(3, 6):
        streams.deliver([output(first, number), output(second, number)])
    assert await one.wait()
    # two streams at 40 messages a second; a timer of the loop may be a clock's tick early
    assert asyncio.get_running_loop().time() - released > 0.045
    assert ids(one.take()) == ids(two.take()) == [3, 4, 5]


async def test_a_request_that_ends_before_its_first_token_ends_at_once() -> None:
    streams = make_streams(0.01)
    request, other = make_request(), make_request()
    stream, _ = streams.open([request]), streams.open([other])
    streams.deliver([output(other, 1)])
    streams.deliver([output(other, 2)])
    streams.deliver([output(request, finish_reason=FinishReason.ERROR)])
    assert not stream.is_live
    assert not streams.is_empty


async def test_an_engine_that_is_lost_leaves_nothing_behind() -> None:
    """What waited still comes, then the error; the timer that was set does nothing any more."""
    streams = make_streams(40.0)
    request, error = make_request(), EngineLostError("gone")
    stream = streams.open([request])
    streams.deliver([output(request, 1)])
    streams.deliver([output(request, 2)])
    streams.deliver([output(request, 3)])
    streams.abandon(error)
    outputs = stream.take()
    assert ids(outputs) == [1, 2, 3]
    assert outputs[-1].error is error
    assert streams.is_empty
    await asyncio.sleep(0.05)
    assert not await stream.wait()


async def test_an_end_that_waits_keeps_the_engine_from_being_empty() -> None:
    streams = make_streams(20.0)
    request = make_request()
    stream = streams.open([request])
    for number in (1, 2):
        streams.deliver([output(request, number)])
    streams.deliver([output(request, 3, finish_reason=FinishReason.LENGTH)])
    assert stream.is_live
    await asyncio.wait_for(streams.wait_empty(), 5)
    assert ids(stream.take()) == [1, 2, 3]
    assert not stream.is_live
