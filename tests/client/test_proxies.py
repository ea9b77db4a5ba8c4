"""The client library and the CLI leave the environment's proxy alone, unless told otherwise."""

from typing import Any

import grpc
import pytest
from nanoinfer import AsyncClient, Client, Unavailable, health
from nanoinfer.cli.app import app
from nanoinfer.cli.collector import Collector, fetch
from typer.testing import CliRunner

from tests.proxies import counting_proxy

TRACE_ID = "0" * 31 + "1"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_client_uses_no_proxy(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_proxy(monkeypatch) as proxy, Client(target, timeout=20) as client:
        assert client.generate("import os").text
        assert health.check(target, "readiness", 20) in {"SERVING", "UNIMPLEMENTED"}
        assert proxy.requests == []


async def test_an_async_client_uses_no_proxy(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_proxy(monkeypatch) as proxy:
        async with AsyncClient(target, timeout=20) as client:
            assert (await client.generate("import os")).text
        assert proxy.requests == []


def test_a_client_uses_a_proxy_where_it_is_told_to(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        counting_proxy(monkeypatch) as proxy,
        Client(target, timeout=20, wait_for_ready=False, use_proxy=True) as client,
    ):
        with pytest.raises(Unavailable):
            client.generate("import os")
        assert health.check(target, "readiness", 20, use_proxy=True) == "UNAVAILABLE"
        assert set(proxy.requests) == {f"CONNECT {target} HTTP/1.1"}


def test_spans_are_fetched_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector() as collector, counting_proxy(monkeypatch) as proxy:
        assert fetch(collector.address, TRACE_ID) == []
        assert proxy.requests == []
        with pytest.raises(grpc.RpcError):
            fetch(collector.address, TRACE_ID, use_proxy=True)
        assert proxy.requests


def test_the_verbs_use_a_proxy_by_flag_or_variable_alone(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb = ("complete", "--target", target, "--connect-timeout", "1", "import os")
    with counting_proxy(monkeypatch) as proxy:
        assert run(*verb).exit_code == 0
        assert run("health", "--target", target).exit_code in {0, 3}
        assert proxy.requests == []
        assert run(*verb, "--use-proxy").exit_code == 3
        asked = len(proxy.requests)
        assert asked
        monkeypatch.setenv("NANOINFER_USE_PROXY", "1")
        assert run(*verb).exit_code == 3
        assert len(proxy.requests) > asked
        assert run(*verb, "--no-use-proxy").exit_code == 0
