"""How requests come in: bytes that are no message, bytes that are too many, senders too slow."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2
from google.protobuf.message_factory import GetMessageClass
from nanoinfer.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from nanoinfer_common import errors, names
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.errors import ServiceError
from nanoinfer_common.receiving import Inbox, parse
from nanoinfer_common.server import RunningServer, ServiceStatus, running

from tests.common.conftest import start_probe
from tests.common.probe import FULL_NAME, ProbeService, one
from tests.http2 import connect

SERVICES = {
    "gateway": (gateway_pb2, gateway_pb2_grpc.add_GatewayServiceServicer_to_server, "Gateway"),
    "tokenizer": (
        tokenizer_pb2,
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server,
        "Tokenizer",
    ),
    "engine": (engine_pb2, engine_pb2_grpc.add_EngineServiceServicer_to_server, "Engine"),
}
METHODS = [
    (service, method)
    for service, (module, _, name) in SERVICES.items()
    for method in module.DESCRIPTOR.services_by_name[f"{name}Service"].methods
]
# No tag, a field that ends too early, a wire type that does not exist.
NOT_MESSAGES = (b"\xff" * 50, b"\x0a", b"\x0f")


class Anything:
    """Every handler of a service, none of which is ever reached."""

    def __getattr__(self, name: str) -> Any:
        async def handler(request: Any, context: Any) -> None:
            async for _ in request:
                raise AssertionError("a message came through")
            raise AssertionError("reached")

        return handler


def typed(service: str) -> Callable[[ServiceStatus], ProbeService]:
    """A service with the handlers of the contract."""

    class Typed(ProbeService):
        def add_to(self, server: grpc.aio.Server) -> None:
            SERVICES[service][1](Anything(), server)  # type: ignore[arg-type]

    return Typed


@pytest.mark.matrix("R8", "R9")
@pytest.mark.parametrize("service", SERVICES)
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        running(typed(service), ServiceSettings(metrics_port=0)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for method in [method for owner, method in METHODS if owner == service]:
            for raw in NOT_MESSAGES:
                capsys.readouterr()
                await refused_once(channel, method, raw)
                written = capsys.readouterr()
                lines = [line for line in (written.out + written.err).splitlines() if line]
                assert len(lines) == 1, lines
                assert "INVALID_ARGUMENT" in lines[0]
                assert "mine" in lines[0]
            path = f"{method.containing_service.full_name}/{method.name}"
            labels = f'code="INVALID_ARGUMENT",method="{path}",reason="INVALID_REQUEST"'
            assert f"nanoinfer_rpcs_total{{{labels}}} 3.0" in await scrape(server)


async def refused_once(channel: grpc.aio.Channel, method: Any, raw: bytes) -> None:
    kind = "stream" if method.client_streaming else "unary"
    kind += "_stream" if method.server_streaming else "_unary"
    argument = one(raw) if method.client_streaming else raw
    path = f"/{method.containing_service.full_name}/{method.name}"
    call: Any = getattr(channel, kind)(path)(argument, metadata=(("x-request-id", "mine"),))
    assert await asyncio.wait_for(call.code(), 60) is grpc.StatusCode.INVALID_ARGUMENT
    trailing = dict(await call.trailing_metadata())
    assert trailing[names.REQUEST_ID] == "mine"
    assert names.STATUS_DETAILS in trailing
    assert "DecodeError" not in await call.details()


async def scrape(server: RunningServer) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.metrics_port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    try:
        text = (await reader.read()).decode()
    finally:
        writer.close()
    return re.sub(r"\{(.*?)\}", lambda m: "{" + ",".join(sorted(m[1].split(","))) + "}", text)


@pytest.mark.matrix("R10")
def test_nesting_beyond_the_parsers_depth_is_an_invalid_argument() -> None:
    # No request is recursive, so the type that is comes from protobuf itself.
    def nested(depth: int) -> bytes:
        value = struct_pb2.Value(null_value=struct_pb2.NULL_VALUE).SerializeToString()
        for _ in range(depth):
            value = _field(1, value)  # ListValue.values
            value = _field(6, value)  # Value.list_value
        return value

    assert isinstance(parse(nested(40), struct_pb2.Value.FromString), struct_pb2.Value)
    for depth in (65, 129, 5000):
        with pytest.raises(ServiceError) as raised:
            parse(nested(depth), struct_pb2.Value.FromString)
        assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.matrix("R10")
def test_no_request_can_nest_without_end() -> None:
    """Were one recursive, validators that walk it would have to bound the depth themselves."""

    def depth(message: Any, above: tuple[str, ...] = ()) -> int:
        assert message.full_name not in above, f"{message.full_name} is recursive"
        below = [field.message_type for field in message.fields if field.message_type]
        return 1 + max((depth(each, (*above, message.full_name)) for each in below), default=0)

    for _, method in METHODS:
        assert depth(method.input_type) < 20
        assert GetMessageClass(method.input_type)()


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_a_request_without_a_message_is_an_invalid_argument(kind: str) -> None:
    async def nothing() -> Any:
        for message in ():
            yield message

    async with start_probe() as probe:
        streaming = f"stream_{kind.rpartition('_')[2]}"
        call: Any = getattr(probe.channel, streaming)(f"/{FULL_NAME}/{kind}")(nothing())
        assert await asyncio.wait_for(call.code(), 60) is grpc.StatusCode.INVALID_ARGUMENT
        assert "no message" in await call.details()


@pytest.mark.matrix("R6")
async def test_requests_that_hold_too_many_bytes_are_refused_until_some_end() -> None:
    async with start_probe(max_message_bytes=10_000, max_received_bytes=40_000) as probe:
        unary: Any = probe.channel.unary_unary(f"/{FULL_NAME}/unary_unary")
        probe.service.act = _waits(probe.service)  # type: ignore[method-assign]
        held = [unary(b"x" * 6_000) for _ in range(3)]
        await eventually(lambda: probe.service.events.count("began") == 3)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary(b"x" * 6_000)
        refused = errors.from_rpc_error(raised.value)
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "QUEUE_FULL"
        assert refused.retry_after is not None
        assert names.REQUEST_ID in dict(raised.value.trailing_metadata() or ())
        small = unary(b"x" * 1_000)  # what still fits is taken
        await eventually(lambda: probe.service.events.count("began") == 4)
        probe.service.release.set()
        await asyncio.gather(*held, small)
        assert await unary(b"x" * 9_000) == b"x" * 9_000


def _waits(service: ProbeService) -> Callable[[bytes, Any], Any]:
    async def act(request: bytes, context: Any) -> None:
        service.events.append("began")
        await service.release.wait()

    return act


async def test_slow_senders_keep_nobody_waiting() -> None:
    """Every place is taken by a message that never ends; others get through all the same."""
    path = f"{FULL_NAME}/unary_unary"
    async with (
        start_probe(max_message_bytes=10_000, max_received_bytes=40_000) as probe,
        connect(probe.server.address) as client,
    ):
        slow = [client.open(path) for _ in range(2)]
        for stream_id in slow:
            await client.send(stream_id, struct.pack(">BI", 0, 9_000) + b"x" * 100)
        await asyncio.sleep(0)
        call: Any = probe.channel.unary_unary(f"/{path}")(b"quick")
        assert await asyncio.wait_for(call.code(), 60) is grpc.StatusCode.OK
        await asyncio.wait_for(client.stream(slow[0]).ended.wait(), 60)
        trailers = client.stream(slow[0]).trailers
        assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert "too slowly" in trailers["grpc-message"]
        # Nobody needs the other's place, so it has time.
        await client.send(slow[1], b"x" * 8_900)
        await asyncio.wait_for(client.stream(slow[1]).ended.wait(), 60)
        assert client.stream(slow[1]).trailers["grpc-status"] == "0"


async def test_many_slow_senders_together_hold_a_place_for_less_time_each() -> None:
    """A crowd that only opens streams: who comes after it waits for no second of each of them."""
    inbox = Inbox(max_bytes=40, max_message_bytes=10, max_hold_seconds=3600)
    crowd = [asyncio.create_task(inbox.read(Messages())) for _ in range(40_000)]
    await asyncio.sleep(0)
    whole = Messages()
    whole.come.set()
    try:
        # Alone, or with few behind them, the first two would keep their places for an hour.
        await asyncio.wait(crowd[:2], timeout=60)
        for refused in crowd[:2]:
            with pytest.raises(ServiceError, match="too slowly"):
                refused.result()
    finally:
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    assert await inbox.read(whole) == b"message"


class Messages:
    """A context whose message comes when it is told."""

    def __init__(self) -> None:
        self.come = asyncio.Event()

    async def read(self) -> bytes:
        await self.come.wait()
        return b"message"


async def test_no_more_messages_are_read_at_once_than_there_is_room_for() -> None:
    inbox = Inbox(max_bytes=60, max_message_bytes=10, max_hold_seconds=1000)
    contexts = [Messages() for _ in range(5)]
    tasks = [asyncio.create_task(inbox.read(context)) for context in contexts]
    await asyncio.sleep(0)
    for context in contexts:
        context.come.set()
    assert await asyncio.gather(*tasks) == [b"message"] * 5
    waiting = [Messages() for _ in range(4)]
    tasks = [asyncio.create_task(inbox.read(context)) for context in waiting]
    waiting[3].come.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not tasks[3].done()  # three places, and three that wait for their messages
    waiting[0].come.set()
    assert await tasks[3] == b"message"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_message_larger_than_all_room_is_taken_alone() -> None:
    inbox = Inbox(max_bytes=10, max_message_bytes=10)
    with inbox.held(100):
        assert inbox.num_held_bytes == 100
        with pytest.raises(ServiceError, match="too many bytes"), inbox.held(1):
            raise AssertionError("let in")
    assert inbox.num_held_bytes == 0


def test_every_service_has_its_settings_for_bytes() -> None:
    root = Path(__file__).parents[2]
    documented = (root / "docs/operations.md").read_text(encoding="utf-8")
    for name in ("max_message_bytes", "max_received_bytes", "max_unsent_bytes"):
        assert name in ServiceSettings.model_fields
        assert f"NANOINFER_{name.upper()}" in documented


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.005)
