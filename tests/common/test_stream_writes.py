"""Stream messages: readers that take nothing, and entries that stay too long."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.overdue import Overdue
from nanoinfer_common.stream_writes import StreamWriter


class Context:
    """Takes a message after `seconds`."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.taken: list[Message] = []

    async def write(self, message: Message) -> None:
        await asyncio.sleep(self.seconds)
        self.taken.append(message)


async def test_a_message_that_is_taken_in_time_is_just_written() -> None:
    writer, context = StreamWriter(0.05), Context(0.01)
    for _ in range(20):  # longer together than one may take
        await writer.write(context, Empty())
    assert len(context.taken) == 20
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def test_a_reader_that_takes_nothing_ends_its_own_stream_alone() -> None:
    writer, slow, quick = StreamWriter(0.1), Context(30), Context(0.001)

    async def stream() -> int:
        for _ in range(200):
            await writer.write(quick, Empty())
        return len(quick.taken)

    stalled = asyncio.create_task(writer.write(slow, Empty()))
    other = asyncio.create_task(stream())
    async with asyncio.timeout(5):
        with pytest.raises(ServiceError, match=r"took no message for 0\.1 s") as raised:
            await stalled
        assert await other == 200
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.reason == "STREAM_STALLED"
    assert not slow.taken


async def test_a_task_goes_on_after_its_reader_stalled() -> None:
    writer = StreamWriter(0.02)
    with pytest.raises(ServiceError):
        await writer.write(Context(30), Empty())
    await writer.write(Context(0.001), Empty())
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


@pytest.mark.parametrize("seconds", [0.02, 30.0], ids=["stalled too", "waiting"])
async def test_a_cancel_from_elsewhere_stays_one(seconds: float) -> None:
    writer = StreamWriter(seconds)

    class Stubborn(Context):
        async def write(self, message: Message) -> None:
            try:
                await super().write(message)
            except asyncio.CancelledError:
                await other.wait()  # until a second cancel has come
                raise

    other = asyncio.Event()
    context: Any = Stubborn(30) if seconds < 1 else Context(30)
    task = asyncio.create_task(writer.write(context, Empty()))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_stays_too_long_is_told_once_and_in_order() -> None:
    late: list[str] = []
    overdue = Overdue[str](0.05, late.append)
    overdue.add("first")
    await asyncio.sleep(0.03)
    overdue.add("second")
    overdue.add("gone")
    assert overdue.discard("gone")
    assert not overdue.discard("gone")
    await asyncio.sleep(0.03)
    assert late == ["first"]
    await asyncio.sleep(0.05)
    assert late == ["first", "second"]
    assert not overdue.discard("second")
    overdue.add("third")  # and again, after a pause
    await asyncio.sleep(0.08)
    assert late == ["first", "second", "third"]
