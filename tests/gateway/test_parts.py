"""Addresses, settings, pages of models, calls."""

from __future__ import annotations

import time

import grpc
import pytest
from nanoinfer.v1 import generation_pb2
from nanoinfer_common.config import parse_settings
from nanoinfer_common.errors import ServiceError
from nanoinfer_gateway.core.caller import Caller
from nanoinfer_gateway.core.catalogue import list_page
from nanoinfer_gateway.settings import GatewaySettings
from nanoinfer_gateway.upstreams import addresses


@pytest.mark.parametrize(
    "address",
    ["host", "host:0", "host:65536", "ho st:1", "http://host:1", "host:port", ":1", ""],
)
def test_an_address_without_form_ends_the_start(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_settings(GatewaySettings, [f"--engine={address}"], "gateway")
    assert raised.value.code == 2
    assert "--engine" in capsys.readouterr().err


def test_addresses_come_as_lists() -> None:
    argv = ["--engine", "a:1,b:2", "--tokenizer", "127.0.0.1:5,127.0.0.2:6"]
    settings = parse_settings(GatewaySettings, argv, "gateway")
    assert settings.engine == ("a:1", "b:2")
    assert settings.tokenizer == ("127.0.0.1:5", "127.0.0.2:6")


def test_several_names_of_tokenizers_are_taken() -> None:
    settings = parse_settings(GatewaySettings, ["--tokenizer", "a:1,dns:///b:2"], "gateway")
    assert settings.tokenizer == ("a:1", "dns:///b:2")


async def test_engines_resolve_to_one_target_a_replica() -> None:
    found = await addresses.resolve(["localhost:7", "127.0.0.2:8", "unix:/x", "[::1]:9"])
    assert found == {"ipv4:127.0.0.1:7", "ipv4:127.0.0.2:8", "unix:/x", "ipv6:[::1]:9"}


def models(*names: str) -> list[generation_pb2.ModelInfo]:
    return [generation_pb2.ModelInfo(id=name) for name in names]


def test_pages_join_up() -> None:
    served = models(*[f"m{number:03}" for number in range(120)])
    seen, token = [], ""
    while True:
        page, token = list_page(served, 50, token)
        seen += page
        if not token:
            break
    assert seen == served
    assert len(list_page(served, 0, "")[0]) == 50
    assert len(list_page(served, 2**31 - 1, "")[0]) == 100
    assert list_page([], 0, "") == ([], "")


@pytest.mark.parametrize(
    ("size", "token"), [(-1, ""), (0, "x"), (0, "AAAA"), (0, "bW9kZWw="), (0, "é")]
)
def test_a_negative_size_and_a_foreign_token_are_refused(size: int, token: str) -> None:
    with pytest.raises(ServiceError) as raised:
        list_page(models("a"), size, token)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.violations[0].field == ("page_size" if size else "page_token")


def test_a_hop_gets_what_is_left_less_50_ms_up_to_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    call = Caller(deadline=102.0)
    assert call.timeout() == pytest.approx(1.95)
    assert call.timeout(1.0) == 1.0
    assert Caller().timeout(3.0) == 3.0
    with pytest.raises(ServiceError) as raised:
        Caller(deadline=100.04).timeout()
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
