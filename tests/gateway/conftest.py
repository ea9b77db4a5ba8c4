"""One tokenizer, one engine and a gateway in front of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.fakes import FakeEngine, FakeTokenizer, Gateway, gateway, serving


@pytest.fixture
async def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def running_gateway(tokenizer: FakeTokenizer, engine: FakeEngine) -> AsyncIterator[Gateway]:
    async with (
        serving(tokenizer) as tokenizer_server,
        serving(engine) as engine_server,
        gateway([tokenizer_server.address], [engine_server.address]) as running,
    ):
        yield running
