"""Gateways that cannot be reached, are late, or go: named within the connect timeout.

Every call here has a deadline of 300 s, so that a test that hangs on it does not end by itself.
"""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import grpc
import nanoinfer
import pytest
from nanoinfer import AsyncClient, Client
from nanoinfer.cli.app import app
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc
from typer.testing import CliRunner

from tests.client.fake_gateway import (
    SUMMARY,
    Behaviour,
    FakeGateway,
    running_gateway,
    start_gateway,
)

CONNECT_SECONDS = 1.0
WAYS = ("generate", "stream", "generate_batch", "count_tokens", "models")


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """Accepts connections; answers the first bytes, or never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def run() -> None:
            accepted = []  # kept, or they would be closed
            while True:
                try:
                    connection, _ = server.accept()
                    accepted.append(connection)
                    if answer is not None:
                        connection.recv(64)
                        connection.sendall(answer)
                        connection.close()
                except OSError:
                    for connection in accepted:
                        connection.close()
                    return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address that refuses: bound, so that nobody else gets it, and not listening."""
    with closing(socket.socket()) as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


@pytest.fixture(params=["wrong port", "unknown name", "silent", "http"])
def dead(request: pytest.FixtureRequest, closed_port: str) -> Iterator[tuple[str, str]]:
    """A target without a gateway, and a word of the reason."""
    match request.param:
        case "wrong port":
            yield closed_port, "refused"
        case "unknown name":
            yield "no-such-host.invalid:50051", "no-such-host.invalid"
        case "silent":
            with listening(None) as target:
                yield target, "SETTINGS|no answer"
        case "http":
            with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as target:
                yield target, "http1|no answer"


def ask(client: Client, way: str) -> Any:
    match way:
        case "stream":
            return client.stream("x").result()
        case "generate_batch":
            return client.generate_batch(["x"] * 100, max_concurrency=2)
        case "models":
            return client.models()
    return getattr(client, way)("x")


async def ask_async(client: AsyncClient, way: str) -> Any:
    match way:
        case "stream":
            return await client.stream("x").result()
        case "generate_batch":
            return await client.generate_batch(["x"] * 100, max_concurrency=2)
        case "models":
            return await client.models()
    return await getattr(client, way)("x")


def is_told(error: nanoinfer.NanoInferError, target: str, word: str) -> bool:
    return (
        type(error) is nanoinfer.Unavailable
        and f"cannot connect to {target} within {CONNECT_SECONDS:g} s: " in error.message
        and re.search(word, error.message) is not None
        and error.request_id is not None
    )


def test_a_dead_target_is_named_with_the_cause(dead: tuple[str, str]) -> None:
    target, word = dead
    with Client(target, connect_timeout=CONNECT_SECONDS) as client:
        with pytest.raises(nanoinfer.Unavailable) as caught:
            client.generate("x")
        assert is_told(caught.value, target, word), caught.value
        with pytest.raises(nanoinfer.Unavailable, match="not ready within") as unready:
            client.wait_until_ready(CONNECT_SECONDS)
    assert target in unready.value.message


async def test_a_dead_target_is_named_with_the_cause_asyncio(dead: tuple[str, str]) -> None:
    target, word = dead
    async with AsyncClient(target, connect_timeout=CONNECT_SECONDS) as client:
        with pytest.raises(nanoinfer.Unavailable) as caught:
            await client.generate("x")
        assert is_told(caught.value, target, word), caught.value
        with pytest.raises(nanoinfer.Unavailable, match="not ready within"):
            await client.wait_until_ready(CONNECT_SECONDS)


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_call_notices(closed_port: str, way: str) -> None:
    client = Client(closed_port, connect_timeout=CONNECT_SECONDS)
    with client, pytest.raises(nanoinfer.Unavailable) as caught:
        ask(client, way)
    assert is_told(caught.value, closed_port, "refused"), caught.value


@pytest.mark.parametrize("way", WAYS)
async def test_every_kind_of_call_notices_asyncio(closed_port: str, way: str) -> None:
    async with AsyncClient(closed_port, connect_timeout=CONNECT_SECONDS) as client:
        with pytest.raises(nanoinfer.Unavailable) as caught:
            await ask_async(client, way)
    assert is_told(caught.value, closed_port, "refused"), caught.value


def test_a_timeout_that_ends_sooner_is_a_deadline_with_a_name(closed_port: str) -> None:
    async def asynchronous() -> nanoinfer.NanoInferError:
        async with AsyncClient(closed_port) as client:
            with pytest.raises(nanoinfer.DeadlineExceeded) as caught:
                await client.generate("x", timeout=0.3)
        return caught.value

    with Client(closed_port) as client, pytest.raises(nanoinfer.DeadlineExceeded) as caught:
        client.generate("x", timeout=0.3)
    for error in (caught.value, asyncio.run(asynchronous())):
        assert closed_port in error.message
        assert "within 0.3 s" in error.message


def test_without_waiting_the_target_is_named_too(closed_port: str) -> None:
    client = Client(closed_port, wait_for_ready=False)
    with client, pytest.raises(nanoinfer.Unavailable, match="refused") as caught:
        client.generate("x")
    assert closed_port in caught.value.message


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_connect_timeout_that_is_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="connect_timeout"):
        Client("127.0.0.1:1", connect_timeout=seconds)


@contextmanager
def late_gateway(behaviour: Behaviour, reserved: socket.socket) -> Iterator[Callable[[], None]]:
    """A gateway at an address that refuses until the function given is called."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 1)])
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(FakeGateway(behaviour), server)

    def start() -> None:
        server.add_insecure_port(f"127.0.0.1:{reserved.getsockname()[1]}")
        server.start()

    yield start
    server.stop(None).wait()


@pytest.fixture
def reserved() -> Iterator[socket.socket]:
    with closing(socket.socket()) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held


@pytest.mark.parametrize("transport", ["blocking", "asyncio"])
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_gateway_that_starts_late_is_waited_for(
    behaviour: Behaviour, reserved: socket.socket, way: str, transport: str
) -> None:
    target = f"127.0.0.1:{reserved.getsockname()[1]}"

    async def asynchronous() -> Any:
        async with AsyncClient(target, connect_timeout=60) as client:
            return await ask_async(client, way)

    with late_gateway(behaviour, reserved) as start:
        timer = threading.Timer(0.7, start)
        timer.start()
        if transport == "asyncio":
            completion = asyncio.run(asynchronous())
        else:
            with Client(target, connect_timeout=60) as client:
                completion = ask(client, way)
        timer.join()
    assert completion.text == "Hello, world"


def test_an_answer_may_take_longer_than_connecting(behaviour: Behaviour) -> None:
    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        time.sleep(3 * 0.5)
        return gateway_pb2.GatewayServiceGenerateResponse(summary=SUMMARY)

    async def asynchronous(target: str) -> Any:
        async with AsyncClient(target, connect_timeout=0.5) as client:
            await client.wait_until_ready(60)
            return await client.generate("x")

    behaviour.unary = slow
    with running_gateway(behaviour) as (target, _):
        with Client(target, connect_timeout=0.5) as client:
            client.wait_until_ready(60)
            assert client.generate("x").model == "fake"
        assert asyncio.run(asynchronous(target)).model == "fake"


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_gateway_that_has_gone_since_is_noticed(behaviour: Behaviour, way: str) -> None:
    with running_gateway(behaviour) as (target, _):
        client = Client(target, connect_timeout=CONNECT_SECONDS)
        assert ask(client, way).text == "Hello, world"
    with client, pytest.raises(nanoinfer.Unavailable) as caught:
        ask(client, way)
    assert target in caught.value.message


async def test_a_gateway_that_has_gone_since_is_noticed_asyncio(behaviour: Behaviour) -> None:
    with running_gateway(behaviour) as (target, _):
        client = AsyncClient(target, connect_timeout=CONNECT_SECONDS)
        assert (await client.generate("x")).text == "Hello, world"
    async with client:
        with pytest.raises(nanoinfer.Unavailable) as caught:
            await client.stream("x").result()
    assert target in caught.value.message


@pytest.mark.matrix("R64")
def test_a_call_that_a_draining_gateway_still_answers_is_waited_for(behaviour: Behaviour) -> None:
    released = threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        released.wait(60)
        return gateway_pb2.GatewayServiceGenerateResponse(summary=SUMMARY)

    behaviour.unary = slow
    server, target, _ = start_gateway(behaviour)
    with Client(target, connect_timeout=0.2) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.generate, "x")
        watchdog = client._watchdog
        wait_for(lambda: watchdog._last_success > 0)
        stopped = server.stop(60)
        # the port is closed now, and the client has noticed
        wait_for(lambda: any(each.lost for each in watchdog._watched))
        released.set()
        assert answer.result(60).model == "fake"
    stopped.wait(60)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_watching_ends_with_the_calls_and_keeps_no_stream(
    client: Client, behaviour: Behaviour
) -> None:
    arrived = threading.Event()

    def silent(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        arrived.set()
        behaviour.cancelled.wait(60)
        yield from ()

    behaviour.stream = silent
    forgotten = client.stream("x")
    assert arrived.wait(60)
    del forgotten
    gc.collect()
    assert behaviour.cancelled.wait(60)
    quick = Client(client.target, connect_timeout=0.1)
    with quick:
        assert quick.count_tokens("x") == 11
        (watching,) = [t for t in threading.enumerate() if t is quick._watchdog.thread]
        watching.join(60)
        assert not watching.is_alive()
        assert quick.count_tokens("x") == 11


def test_the_command_line_names_the_target(closed_port: str) -> None:
    timeout = ["--connect-timeout", "0.5"]
    result = CliRunner().invoke(app, ["chat", "--target", closed_port, *timeout, "x"])
    assert result.exit_code == 3
    assert f"{closed_port} was not ready within 0.5 s" in result.stderr
    assert "refused" in result.stderr
