"""Stream messages: slots, readers that take nothing, and entries that stay too long."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.overdue import Overdue
from nanoinfer_common.stream_writes import StreamWriter, WriteSlots


class Context:
    """Takes a message after `seconds`."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.taken: list[Message] = []

    async def write(self, message: Message) -> None:
        await asyncio.sleep(self.seconds)
        self.taken.append(message)


class Holders:
    """Hold slots, and count how many at one time."""

    def __init__(self, slots: WriteSlots) -> None:
        self._slots = slots
        self._inside = self.most = 0
        self.order: list[int] = []

    async def hold(self, seconds: float, number: int = 0) -> None:
        async with self._slots.hold():
            self.order.append(number)
            self._inside += 1
            self.most = max(self.most, self._inside)
            await asyncio.sleep(seconds)
            self._inside -= 1


async def test_slots_bound_what_is_in_flight_and_keep_the_order() -> None:
    holders = Holders(WriteSlots(num_slots=2, max_hold_seconds=5))
    await asyncio.gather(*(holders.hold(0.005, number) for number in range(10)))
    assert holders.most == 2
    assert holders.order == list(range(10))


async def test_slots_are_few_and_a_long_write_does_not_keep_them() -> None:
    slots = WriteSlots(2)
    stuck = Holders(slots)
    stalled = [asyncio.create_task(stuck.hold(30)) for _ in range(2)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        await Holders(slots).hold(0.001)
    for task in stalled:
        task.cancel()
    await asyncio.gather(*stalled, return_exceptions=True)
    later = Holders(slots)
    await asyncio.gather(*[later.hold(0.001) for _ in range(20)])
    assert later.most == 2  # what a stalled write gave back early was given back once


async def test_a_slot_is_not_held_for_long() -> None:
    slots = WriteSlots(num_slots=1, max_hold_seconds=0.05)
    task = asyncio.create_task(Holders(slots).hold(600))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(Holders(slots).hold(0))
    await asyncio.sleep(0)
    assert not waiting.done()  # the slot is held for its time
    await waiting
    assert not task.done()  # and no longer
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    later = Holders(slots)  # the late end gives no second slot away
    await asyncio.gather(*[later.hold(0.001) for _ in range(10)])
    assert later.most == 1


async def test_a_waiter_that_was_cancelled_gives_no_slot_away() -> None:
    slots = WriteSlots(num_slots=1, max_hold_seconds=0.05)
    async with slots.hold():
        waiting = asyncio.create_task(Holders(slots).hold(0))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0.1)  # what nobody holds is not given back
    later = Holders(slots)
    await asyncio.gather(*[later.hold(0.001) for _ in range(10)])
    assert later.most == 1


async def test_a_message_that_is_taken_in_time_is_just_written() -> None:
    writer, context = StreamWriter(1.0), Context(0.08)
    for _ in range(15):  # longer together than one may take
        await writer.write(context, Empty())
    assert len(context.taken) == 15
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def test_a_reader_that_takes_nothing_ends_its_own_stream_alone() -> None:
    writer, slow, quick = StreamWriter(1.0), Context(600), Context(0.001)

    async def stream() -> int:
        for _ in range(200):
            await writer.write(quick, Empty())
        return len(quick.taken)

    stalled = asyncio.create_task(writer.write(slow, Empty()))
    other = asyncio.create_task(stream())
    async with asyncio.timeout(60):
        with pytest.raises(ServiceError, match="took no message for 1 s") as raised:
            await stalled
        assert await other == 200
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.reason == "STREAM_STALLED"
    assert not slow.taken


async def test_a_task_goes_on_after_its_reader_stalled() -> None:
    writer = StreamWriter(0.5)
    with pytest.raises(ServiceError):
        await writer.write(Context(600), Empty())
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


async def test_a_stall_is_one_where_the_task_was_cancelled_before() -> None:
    async def stream() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await StreamWriter(0.02).write(Context(30), Empty())

    task = asyncio.create_task(stream())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(ServiceError):
        await task


async def test_what_became_of_the_write_decides_nothing_about_the_cancel() -> None:
    class Late(Context):
        async def write(self, message: Message) -> None:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                raise ConnectionError from None

    with pytest.raises(ConnectionError):
        await StreamWriter(0.02).write(Late(), Empty())
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def test_one_timer_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), []

    def call_later(seconds: float, *_: object) -> Any:
        timers.append(seconds)
        return object()

    overdue = Overdue[int](30, lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_later", call_later)
        for entry in range(100):
            overdue.add(entry)
            overdue.discard(entry - 1)
    assert timers == [30]


async def test_what_stays_too_long_is_told_once_and_in_order() -> None:
    late: list[str] = []
    overdue = Overdue[str](0.2, late.append)
    overdue.add("first")
    await asyncio.sleep(0.15)
    overdue.add("second")
    overdue.add("gone")
    assert overdue.discard("gone")
    assert not overdue.discard("gone")
    await eventually(lambda: bool(late))
    assert late[0] == "first"
    await eventually(lambda: len(late) > 1)
    assert late == ["first", "second"]
    assert not overdue.discard("second")
    overdue.add("third")  # and again, after a pause
    await eventually(lambda: len(late) > 2)
    assert late == ["first", "second", "third"]


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.005)
