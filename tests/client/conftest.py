from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from nanoinfer import AsyncClient, Client

from tests.client.fake_gateway import CLIENT_TIMEOUT, Behaviour, running_gateway


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def target(behaviour: Behaviour) -> Iterator[str]:
    with running_gateway(behaviour) as (address, _):
        yield address


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout=CLIENT_TIMEOUT) as client:
        yield client


@pytest.fixture
async def async_client(target: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(target, timeout=CLIENT_TIMEOUT) as client:
        yield client
