"""The pace at which readers are woken: what comes at once, what waits, and what counts."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from nanoinfer_engine.core.errors import EngineLostError, StalledReaderError
from nanoinfer_engine.core.request import (
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    SampledToken,
)
from nanoinfer_engine.core.stream import MAX_TAKEN_BYTES, Stream, Streams, memory_of
from nanoinfer_engine.core.watchdog import Patience

from tests.engine.fakes import make_request, pieces

SLOW = 0.01  # messages a second: nobody is woken a second time while a test runs


def make_streams(max_messages_per_second: float) -> Streams:
    return Streams(lambda *_: None, Patience(), max_messages_per_second)


def output(request: Request, *ids: int, finish_reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request, tuple(map(SampledToken, ids)), finish_reason)


def ids(outputs: list[RequestOutput]) -> list[int]:
    return [token.token_id for each in outputs for token in each.tokens]


async def is_woken(stream: Stream) -> bool:
    waiting = asyncio.ensure_future(stream.wait())
    await asyncio.sleep(0)
    done = waiting.done()
    waiting.cancel()
    return done


async def within(seconds: float, stream: Stream) -> list[int]:
    """What its reader takes when it is woken."""
    async with asyncio.timeout(seconds):
        assert await stream.wait()
    return ids(stream.take())


async def test_first_tokens_never_wait_and_others_do() -> None:
    streams = make_streams(SLOW)
    early, late = make_request(), make_request()
    one, two = streams.open([early]), streams.open([late])
    streams.deliver([output(early, 1)])
    assert await within(0, one) == [1]
    streams.deliver([output(early, 2)])  # none has been sent before that would count
    assert await within(0, one) == [2]
    streams.deliver([output(early, 3), output(late, 10)])
    assert await within(0, two) == [10]
    streams.deliver([output(early, 4), output(late, 11)])
    assert not await is_woken(one)
    assert not await is_woken(two)
    assert ids(one.take()) == [3, 4]  # a reader that comes by itself finds it all


async def test_what_waited_comes_together_when_it_is_due() -> None:
    rate, tick = 4.0, 0.05
    streams = make_streams(rate)
    first, second = make_request(), make_request()
    one, two = streams.open([first]), streams.open([second])
    began = asyncio.get_running_loop().time()
    for number in (1, 2):
        streams.deliver([output(first, number), output(second, number)])
        one.take()
        two.take()
    for start in (3, 6, 9):
        expected = list(range(start, start + 3))
        for number in expected:
            streams.deliver([output(first, number), output(second, number)])
        assert await within(60, one) == expected
        assert await within(0, two) == expected
    # three times two messages; what may be early is a tick of the loop's clock
    assert asyncio.get_running_loop().time() - began > 6 / rate - tick


async def test_prompt_logprobs_never_wait() -> None:
    """Nor where another completion's tokens came first: the answer begins with them."""
    streams = make_streams(SLOW)
    scorer, sibling = make_request(), make_request()
    stream = streams.open([scorer, sibling])
    for number in (1, 2):
        streams.deliver([output(sibling, number)])
        stream.take()
    streams.deliver([output(sibling, 3)])
    assert not await is_woken(stream)
    streams.deliver([RequestOutput(scorer, prompt_logprobs=(SampledToken(7),))])
    assert await within(0, stream) == [3]


async def test_an_end_never_waits_and_takes_along_what_did() -> None:
    streams = make_streams(SLOW)
    request, other = make_request(), make_request()
    stream, beside = streams.open([request]), streams.open([other])
    for number in (1, 2):
        streams.deliver([output(request, number), output(other, number)])
        stream.take()
        beside.take()
    streams.deliver([output(request, 3), output(other, 3)])
    streams.deliver([output(request, 4, finish_reason=FinishReason.LENGTH), output(other, 4)])
    assert await within(0, stream) == [3, 4]
    assert not await stream.wait()
    assert not await is_woken(beside)
    streams.deliver([output(other, finish_reason=FinishReason.CANCELLED)])
    assert streams.is_empty


async def test_only_streams_with_something_to_send_count() -> None:
    """Not those that wait for their start, and completions of one request as one."""
    streams = make_streams(10.0)
    several = [make_request() for _ in range(100)]
    stream = streams.open(several)
    for _ in range(100):
        streams.open([make_request()])
    for number in (1, 2):
        streams.deliver([output(each, number) for each in several])
        stream.take()
    streams.deliver([output(each, 3) for each in several])
    assert await within(60, stream) == [3] * 100  # after 0.1 s, not 10 or 20


async def test_what_has_been_brought_does_not_count_again() -> None:
    streams = make_streams(100.0)
    requests = [make_request() for _ in range(100)]
    opened = [streams.open([request]) for request in requests]
    for number in (1, 2):
        streams.deliver([output(request, number) for request in requests])
        for stream in opened:
            stream.take()
    seconds: list[float] = []
    for number in range(3, 23):
        began = asyncio.get_running_loop().time()
        streams.deliver([output(requests[0], number)])
        assert await within(60, opened[0]) == [number]
        seconds.append(asyncio.get_running_loop().time() - began)
    # the first waits for all that was brought before; each would, if the other 99 counted again
    assert sum(seconds[1:]) / len(seconds[1:]) < seconds[0] / 2


async def test_a_lost_engine_ends_all_streams_at_once() -> None:
    streams = make_streams(SLOW)
    request, error = make_request(), EngineLostError("gone")
    stream, waiting = streams.open([request]), streams.open([make_request()])
    for number in (1, 2, 3):
        streams.deliver([output(request, number)])
    streams.abandon(error)
    outputs = stream.take()
    assert ids(outputs) == [1, 2, 3]
    assert outputs[-1].error is error
    assert waiting.take()[0].error is error
    assert streams.is_empty


async def test_only_what_a_reader_could_have_taken_is_unread() -> None:
    """What the pace holds back is brought at the bound; who does not take that is too slow."""
    ended: list[Exception | None] = []
    patience = Patience(reader_seconds=0.0, buffered_tokens=2)
    streams = Streams(lambda _, error=None: ended.append(error), patience, SLOW)
    request = make_request()
    stream = streams.open([request])
    for number in (1, 2):
        streams.deliver([output(request, number)])
        stream.take()
    for start in (3, 6):
        for number in range(start, start + 3):
            assert not await is_woken(stream)
            streams.deliver([output(request, number)])
        assert await within(0, stream) == [start, start + 1, start + 2]
    assert not ended
    for number in range(9, 13):
        streams.deliver([output(request, number)])
    assert isinstance(ended[0], StalledReaderError)


def scored(request: Request, number: int, num_alternatives: int) -> RequestOutput:
    """An output of one token with alternatives, no object of which another shares."""
    top = tuple(
        Logprob(1000 + number * 1000 + i, -1.0 - number - i / 7, 1000 + i)
        for i in range(num_alternatives)
    )
    chosen = SampledToken(1000 + number, Logprob(1000 + number, -0.5 - number, 1), top)
    return RequestOutput(request, (chosen,))


@pytest.mark.parametrize("num_alternatives", [0, 5, 148])
def test_the_estimated_memory_of_an_output_is_what_it_takes(num_alternatives: int) -> None:
    request = make_request()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        outputs = [scored(request, number, num_alternatives) for number in range(50)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    estimated = sum(map(memory_of, outputs))
    assert estimated / 2 < after - before < estimated


async def test_a_message_takes_no_more_than_its_bytes_and_the_rest_stays_counted() -> None:
    streams = make_streams(5000)
    request = make_request()
    stream = streams.open([request])
    outputs = [scored(request, number, 148) for number in range(100)]
    each = memory_of(outputs[0])
    for one in outputs:
        streams.deliver([one])
    taken = []
    while len(taken) < len(outputs):
        assert stream.num_buffered_bytes == (len(outputs) - len(taken)) * each
        assert stream.num_buffered_tokens == len(outputs) - len(taken)
        assert await is_woken(stream)
        part = stream.take()
        assert sum(map(memory_of, part)) < MAX_TAKEN_BYTES + each
        taken += part
    assert taken == outputs
    assert stream.num_buffered_bytes == stream.num_buffered_tokens == 0
    assert not await is_woken(stream)


@pytest.mark.matrix("R45")
async def test_the_stream_with_most_unread_bytes_is_ended_beyond_the_bound_of_all() -> None:
    ended: list[tuple[tuple[Request, ...], Exception | None]] = []
    one, two, three = make_request(), make_request(), make_request()
    bound = memory_of(scored(one, 0, 20)) * 10
    streams = Streams(
        lambda requests, error=None, reason=None: ended.append((requests, error)),
        Patience(buffered_bytes=bound),
        5000,
    )
    small, large, done = streams.open([one]), streams.open([two]), streams.open([three])
    for number in range(3):
        streams.deliver([scored(one, number, 20), scored(three, number, 20)])
    streams.deliver([RequestOutput(three, finish_reason=FinishReason.LENGTH)])
    for number in range(5):
        streams.deliver([scored(two, number, 20)])
    ((requests, error),) = ended
    assert requests == (two,)
    assert isinstance(error, StalledReaderError)
    assert large.num_buffered_bytes == 0
    streams.deliver([scored(two, 9, 20)])  # computed before the engine knew
    streams.deliver([RequestOutput(two, finish_reason=FinishReason.ERROR, error=error)])
    found = [output async for part in pieces(large) for output in part]
    assert found[0].error is error
    assert not any(output.tokens for output in found)
    # What has ended holds bytes, too, and its reader learns that they are gone.
    for number in range(3, 12):
        streams.deliver([scored(one, number, 20)])
        small.take()
    assert len(ended) == 1
    for number in range(12, 20):
        streams.deliver([scored(one, number, 20)])
    assert len(ended) == 2
    assert ended[1][0] == (one,)
    for stream in (small, done):
        stream.close()
    assert streams.open([make_request()])._unread.num_bytes == 0


async def test_a_finished_stream_that_nobody_reads_is_ended_as_well() -> None:
    request, other = make_request(), make_request()
    bound = memory_of(scored(request, 0, 20)) * 10
    cancelled: list[object] = []
    streams = Streams(
        lambda requests, error=None: cancelled.append(requests),
        Patience(buffered_bytes=bound),
        5000,
    )
    finished, live = streams.open([request]), streams.open([other])
    for number in range(9):
        streams.deliver([scored(request, number, 20)])
    streams.deliver([RequestOutput(request, finish_reason=FinishReason.LENGTH)])
    for number in range(3):
        streams.deliver([scored(other, number, 20)])
    assert not cancelled  # the engine has nothing to end
    (output,) = finished.take()
    assert isinstance(output.error, StalledReaderError)
    assert len(ids(live.take())) == 3
