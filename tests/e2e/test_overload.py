"""More than can be served: what is refused, what completes, and how much work gets done."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2
from nanoinfer_engine.core.batch import Batch, RowResult

from tests.e2e.small_stack import SmallStack, small_stack, words
from tests.engine.fakes import FakeRunner, expected_tokens

NUM_ROWS, NUM_WAITING, NUM_TOKENS = 4, 4, 16
ENGINE = {"max_batch_requests": NUM_ROWS, "max_batch_tokens": 32, "max_waiting_requests": 64}


def request(prompt: list[int], num_tokens: int = NUM_TOKENS) -> pb.GatewayServiceGenerateRequest:
    options = pb.GenerationOptions(
        sampling=generation_pb2.SamplingParams(seed=0),
        stopping=generation_pb2.StoppingParams(max_tokens=num_tokens, ignore_eos=True),
    )
    ids = generation_pb2.TokenIds(ids=prompt)
    return pb.GatewayServiceGenerateRequest(token_ids=ids, options=options)


def details(error: grpc.aio.AioRpcError) -> tuple[str, float]:
    """The reason of a refusal, and the seconds after which to come again; 0 where none are told."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for detail in status.details:
        for known in (info, retry):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    return info.reason, retry.retry_delay.ToTimedelta().total_seconds()


class Paced(FakeRunner):
    """Steps that take their time on the event loop, so that clients keep up on any machine."""

    def __init__(self, seconds: float) -> None:
        super().__init__(num_blocks=256)
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()

    def execute(self, batch: Batch) -> list[RowResult]:
        pause = asyncio.run_coroutine_threadsafe(asyncio.sleep(self.seconds), self.loop)
        pause.result(60)
        return super().execute(batch)


@dataclass
class Offered:
    """Clients that ask again as soon as they are answered or refused, and what they got."""

    stack: SmallStack
    outcomes: Counter[str] = field(default_factory=Counter)
    most_waiting: int = 0

    async def client(self, number: int) -> None:
        prompt = [11 + number, 12, 13]
        expected = words(expected_tokens(prompt, NUM_TOKENS))
        while True:
            try:
                answer = await self.stack.gateway.stub.Generate(request(prompt))
            except grpc.aio.AioRpcError as error:
                self.refused(error)
                await asyncio.sleep(0.05)  # much sooner than it was told
            else:
                assert answer.choices[0].text == expected
                self.outcomes["completed"] += 1
            load = self.stack.engine.service._engine.load
            self.most_waiting = max(self.most_waiting, load.num_waiting)

    def refused(self, error: grpc.aio.AioRpcError) -> None:
        reason, seconds = details(error)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert seconds > 0
        self.outcomes[reason] += 1

    async def goodput(self, num_clients: int, num_completions: int) -> float:
        """Tokens of completed requests in a step of the engine, under so many clients."""
        clients = [asyncio.create_task(self.client(number)) for number in range(num_clients)]
        await self.until(clients, NUM_ROWS)  # under way
        first, before = len(self.stack.runner.batches), self.outcomes["completed"]
        await self.until(clients, before + num_completions)
        num_steps = len(self.stack.runner.batches) - first
        num_completed = self.outcomes["completed"] - before
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await self.stack.engine.idle()
        return num_completed * NUM_TOKENS / num_steps

    async def until(self, clients: list[asyncio.Task[None]], num_completed: int) -> None:
        while self.outcomes["completed"] < num_completed:
            await asyncio.sleep(0.01)
            for client in clients:
                if client.done():
                    client.result()


@pytest.mark.matrix("R48")
async def test_goodput_under_overload_is_that_of_the_peak(tmp_path: Path) -> None:
    runner = Paced(0.005)
    capacity = NUM_ROWS + NUM_WAITING
    async with small_stack(tmp_path, runner, ENGINE, {"max_requests": capacity}) as stack:
        peak = Offered(stack)
        most = await peak.goodput(capacity, 60)
        assert set(peak.outcomes) == {"completed"}
        for factor in (2, 10):
            offered = Offered(stack)
            goodput = await offered.goodput(factor * capacity, 60)
            assert goodput > 0.9 * most, f"{goodput} of {most} tokens a step at {factor} times"
            assert set(offered.outcomes) == {"completed", "QUEUE_FULL"}
            assert offered.most_waiting <= NUM_WAITING


@pytest.mark.matrix("R48")
async def test_a_refusal_waits_for_nothing(tmp_path: Path) -> None:
    runner = FakeRunner()
    async with small_stack(tmp_path, runner, ENGINE, {"max_requests": NUM_ROWS}) as stack:
        runner.gate.clear()  # no step ends
        stub = stack.gateway.stub
        held = [asyncio.ensure_future(stub.Generate(request([11]))) for _ in range(NUM_ROWS)]
        await stack.engine.until(lambda load: load.running_requests + load.waiting_requests >= 4)
        for _ in range(10 * NUM_ROWS):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Generate(request([12]))
            assert details(refused.value)[0] == "QUEUE_FULL"
        assert not any(call.done() for call in held)
        runner.gate.set()
        expected = words(expected_tokens([11], NUM_TOKENS))
        assert [answer.choices[0].text for answer in await asyncio.gather(*held)] == 4 * [expected]


def of(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("x-nanoinfer-tenant", tenant),)


async def outcome(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return details(error)[0]
    return "completed"


@pytest.mark.matrix("R50")
async def test_a_flood_leaves_others_room_where_tenants_have_a_bound(tmp_path: Path) -> None:
    runner, quota = FakeRunner(num_blocks=256), 8
    edge = {"max_requests": 12, "max_tenant_requests": quota}
    async with small_stack(tmp_path, runner, ENGINE, edge) as stack:
        runner.gate.clear()
        stub = stack.gateway.stub
        flood = [
            asyncio.ensure_future(outcome(stub.Generate(request([20 + i]), metadata=of("flood"))))
            for i in range(100)
        ]
        await stack.engine.until(
            lambda load: load.running_requests + load.waiting_requests == quota
        )
        other = asyncio.ensure_future(stub.Generate(request([11], 1), metadata=of("other")))
        await stack.engine.until(
            lambda load: load.running_requests + load.waiting_requests == quota + 1
        )
        first = len(runner.batches)
        runner.gate.set()
        await other
        assert Counter(await asyncio.gather(*flood)) == {
            "completed": quota,
            "QUOTA_EXCEEDED": 100 - quota,
        }
        starts = [
            row.token_ids[0]
            for batch in runner.batches[first - 1 :]
            for row in batch.rows
            if row.start == 0
        ]
        # those that ran already, and no other one of the flood, came first
        assert starts.index(11) <= NUM_ROWS


@pytest.mark.matrix("R50")
async def test_a_flood_of_prompts_leaves_the_tokenizer_to_others(tmp_path: Path) -> None:
    quota, released = 3, asyncio.Event()
    edge = {"max_tenant_requests": quota}
    async with small_stack(tmp_path, FakeRunner(), ENGINE, edge) as stack:
        is_flood = {"x-nanoinfer-tenant": "flood"}.items()

        async def busy(context: Any) -> None:
            if is_flood <= dict(context.invocation_metadata()).items():
                await released.wait()

        stack.tokenizer.before = busy
        stub = stack.gateway.stub
        count = pb.GatewayServiceCountTokensRequest(text="abc")
        flood = [
            asyncio.ensure_future(outcome(stub.CountTokens(count, metadata=of("flood"))))
            for _ in range(40)
        ]
        while sum(call.done() for call in flood) < 40 - quota:
            await asyncio.sleep(0.01)
        assert len(stack.tokenizer.named("Encode")) == quota
        assert (await stub.CountTokens(count, metadata=of("other"))).num_tokens == 3
        assert sum(call.done() for call in flood) == 40 - quota
        released.set()
        assert Counter(await asyncio.gather(*flood)) == {
            "completed": quota,
            "QUOTA_EXCEEDED": 40 - quota,
        }
