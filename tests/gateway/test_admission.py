"""Admission: exact under a burst, nothing lost, an answer at once."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nanoinfer_common.errors import ServiceError
from nanoinfer_gateway.core.admission import Admission, Bounds

WIDE = 10**9


def admission(**bounds: int) -> tuple[Admission, list[str]]:
    rejections: list[str] = []
    values = {"max_requests": WIDE, "max_prompt_tokens": WIDE, "max_prompt_bytes": WIDE}
    return Admission(Bounds(**{**values, **bounds}), rejections.append), rejections


@pytest.mark.matrix("R49")
async def test_a_burst_within_one_tick_admits_exactly_the_cap() -> None:
    gate, rejections = admission(max_requests=5)

    async def handle() -> bool:
        try:
            with gate.reserve(tenant=None, num_bytes=1):
                await asyncio.sleep(0.01)
                return True
        except ServiceError:
            return False

    assert sum(await asyncio.gather(*[handle() for _ in range(100)])) == 5
    assert rejections == ["requests"] * 95
    assert await handle()


@pytest.mark.parametrize(
    ("bounds", "bound"),
    [
        ({"max_requests": 1}, "requests"),
        ({"max_prompt_tokens": 3}, "prompt_tokens"),
        ({"max_prompt_bytes": 15}, "prompt_bytes"),
    ],
)
def test_each_bound_refuses_with_retry_info(bounds: dict[str, int], bound: str) -> None:
    gate, rejections = admission(**bounds)
    with (
        gate.reserve(tenant=None, num_bytes=8),
        pytest.raises(ServiceError) as raised,
        gate.reserve(tenant=None, num_bytes=8),
    ):
        pass
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.reason == "QUEUE_FULL"
    assert raised.value.retry_after is not None
    assert rejections == [bound]


def test_tenants_have_bounds_of_their_own_and_the_nameless_share_one() -> None:
    gate, rejections = admission(max_tenant_requests=1)
    with gate.reserve(tenant="a", num_bytes=1), gate.reserve(tenant="b", num_bytes=1):
        with pytest.raises(ServiceError) as raised, gate.reserve(tenant="a", num_bytes=1):
            pass
        with (
            gate.reserve(tenant=None, num_bytes=1),
            pytest.raises(ServiceError),
            gate.reserve(tenant=None, num_bytes=1),
        ):
            pass
    assert raised.value.reason == "QUOTA_EXCEEDED"
    assert rejections == ["tenant", "tenant"]
    with gate.reserve(tenant="a", num_bytes=1):
        assert gate.num_requests == 1


def test_the_true_count_replaces_the_estimate() -> None:
    gate, _ = admission(max_prompt_tokens=100)
    with gate.reserve(tenant=None, num_bytes=400) as first:
        assert gate.num_prompt_tokens == 100
        gate.settle(first, 10)
        with gate.reserve(tenant=None, num_bytes=360):
            assert gate.num_prompt_tokens == 100
            gate.settle(first, 300)  # admitted stays admitted
            assert gate.num_prompt_tokens == 390


def test_a_prompt_beyond_a_whole_bound_gets_in_alone() -> None:
    gate, rejections = admission(max_prompt_tokens=10)
    with (
        gate.reserve(tenant=None, num_bytes=1000),
        pytest.raises(ServiceError),
        gate.reserve(tenant=None, num_bytes=1),
    ):
        pass
    with gate.reserve(tenant=None, num_bytes=1):
        assert gate.num_requests == 1
    assert rejections == ["prompt_tokens"]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), st.integers(0, 60))))
def test_everything_held_is_given_back(steps: list[tuple[int, int, int]]) -> None:
    gate, _ = admission(max_requests=4, max_prompt_tokens=30, max_tenant_requests=2)
    held: list[ExitStack] = []
    for num_bytes, tenant, settled in steps:
        place = ExitStack()
        try:
            taken = place.enter_context(gate.reserve(tenant=str(tenant % 3), num_bytes=num_bytes))
        except ServiceError:
            if held:
                held.pop(0).close()
            continue
        gate.settle(taken, settled)
        held.append(place)
        assert gate.num_requests == len(held) <= 4
    for place in held:
        place.close()
    assert (gate.num_requests, gate.num_prompt_tokens, gate.num_prompt_bytes) == (0, 0, 0)
    assert not gate._tenants
