"""Messages and metadata beyond the limits: an exception of their own, not `Overloaded`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import nanoinfer
import pytest
from nanoinfer import AsyncClient, Client
from nanoinfer.cli.app import app
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc
from typer.testing import CliRunner

from tests.client.fake_gateway import Behaviour, FakeGateway, refusal, running_gateway

LIMIT = 2**20
LARGE = "x" * (2 * LIMIT)
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@contextmanager
def strict_gateway(behaviour: Behaviour) -> Iterator[str]:
    """Takes messages of 1 MiB at most."""
    options = [("grpc.max_receive_message_length", LIMIT)]
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=options)
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(FakeGateway(behaviour), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def ask(client: Client, way: str, prompt: str, **options: Any) -> Any:
    if way == "stream":
        return client.stream(prompt, **options).result()
    return client.generate(prompt, **options)


async def ask_async(client: AsyncClient, way: str, prompt: str, **options: Any) -> Any:
    if way == "stream":
        return await client.stream(prompt, **options).result()
    return await client.generate(prompt, **options)


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_a_request_beyond_the_clients_limit(target: str, way: str) -> None:
    client = Client(target, max_message_bytes=LIMIT)
    with client, pytest.raises(nanoinfer.TooLarge) as caught:
        ask(client, way, LARGE)
    async with AsyncClient(target, max_message_bytes=LIMIT) as client_async:
        with pytest.raises(nanoinfer.TooLarge) as caught_async:
            await ask_async(client_async, way, LARGE)
    for error in (caught.value, caught_async.value):
        assert error.code is FULL
        assert error.message.startswith("the request has 2,097,")
        assert "this client sends at most 1,048,576 (max_message_bytes)" in error.message
        assert error.retry_after is None


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_a_request_beyond_the_servers_limit(behaviour: Behaviour, way: str) -> None:
    with strict_gateway(behaviour) as target:
        with Client(target) as client, pytest.raises(nanoinfer.TooLarge) as caught:
            ask(client, way, LARGE)
        async with AsyncClient(target) as client_async:
            with pytest.raises(nanoinfer.TooLarge) as caught_async:
                await ask_async(client_async, way, LARGE)
    for error in (caught.value, caught_async.value):
        assert "the server takes at most 1,048,576" in error.message


async def test_a_response_beyond_the_clients_limit(target: str, behaviour: Behaviour) -> None:
    behaviour.words = [LARGE]
    for way in ("generate", "stream"):
        client, told = Client(target, max_message_bytes=LIMIT), "client takes at most 1,048,576"
        with client, pytest.raises(nanoinfer.TooLarge, match=told):
            ask(client, way, "x")
        async with AsyncClient(target, max_message_bytes=LIMIT) as client_async:
            with pytest.raises(nanoinfer.TooLarge, match="the response has 2,097,"):
                await ask_async(client_async, way, "x")


async def test_metadata_beyond_the_servers_limit(target: str) -> None:
    metadata = {"x-own": "a" * 100_000}
    with Client(target) as client, pytest.raises(nanoinfer.TooLarge, match=r"metadata \(headers\)"):
        client.generate("x", metadata=metadata)
    async with AsyncClient(target) as client_async:
        with pytest.raises(nanoinfer.TooLarge, match="exceeds"):
            await client_async.generate("x", metadata=metadata)


def test_metadata_of_a_response_beyond_the_clients_limit(target: str, behaviour: Behaviour) -> None:
    def much(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("x-own", "a" * 100_000),))
        return gateway_pb2.GatewayServiceGenerateResponse()

    behaviour.unary = much
    with Client(target) as client, pytest.raises(nanoinfer.TooLarge, match="exceeds"):
        client.generate("x")


@pytest.mark.parametrize(
    ("reason", "message", "kind"),
    [
        ("ANSWER_TOO_LARGE", "too much", nanoinfer.TooLarge),
        ("QUEUE_FULL", "the queue is larger than max", nanoinfer.Overloaded),
        ("", "Concurrent RPC limit exceeded!", nanoinfer.Overloaded),
        ("", "grpc: received message larger than max (9 vs. 8)", nanoinfer.TooLarge),
        ("", "gRPC message exceeds maximum size 8: 9", nanoinfer.TooLarge),
        ("", "grpc: received message larger than max\n", nanoinfer.TooLarge),
    ],
)
def test_a_full_server_and_a_large_message_are_told_apart(
    client: Client, behaviour: Behaviour, reason: str, message: str, kind: type
) -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        if not reason:
            context.abort(FULL, message)
        context.abort_with_status(refusal(FULL, reason, message))

    behaviour.unary = refuse
    with pytest.raises(nanoinfer.NanoInferError) as caught:
        client.generate("x")
    assert type(caught.value) is kind
    assert caught.value.message.strip() == message.strip()


def test_the_command_line_calls_it_invalid(behaviour: Behaviour) -> None:
    with running_gateway(behaviour) as (target, _):
        result = CliRunner().invoke(app, ["complete", "--target", target], input="x" * 9_400_000)
    assert result.exit_code == 4
    assert "the request has 9,400," in result.stderr
    assert "try again" not in result.stderr
    assert behaviour.arrivals == []
