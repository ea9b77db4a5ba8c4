"""A minute of everything at once, and nothing is left: `benchmarks/soak.py` does it for longer."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest
from nanoinfer.v1 import gateway_pb2 as pb
from nanoinfer.v1 import generation_pb2

from tests.e2e.conftest import GUIDE, ROOT
from tests.e2e.small_stack import SmallStack, small_stack, words
from tests.engine.fakes import FakeRunner, expected_tokens

SOAK_SECONDS = 60.0
NUM_CLIENTS, MAX_TOKENS = 16, 60
ENGINE = {"max_batch_requests": 6, "max_batch_tokens": 24, "max_waiting_requests": 64}
MEMORY_MARGIN = 16 * 2**20


@dataclass(frozen=True)
class Held:
    """What a process holds at one moment."""

    memory: int
    descriptors: int
    tasks: int


def held() -> Held:
    gc.collect()
    process = psutil.Process()
    return Held(process.memory_info().rss, process.num_fds(), len(asyncio.all_tasks()))


@dataclass
class Visitor:
    """A client that reads to the end, cancels, stops at a string, or runs into its deadline."""

    stack: SmallStack
    chance: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)

    async def visit(self) -> None:
        chance = self.chance
        prompt = [10 + chance.randrange(40) for _ in range(chance.randrange(1, 30))]
        seed, num_tokens = chance.randrange(100), chance.randrange(1, MAX_TOKENS)
        whole = words(expected_tokens(prompt, num_tokens, seed))
        stop = chance.choice(whole.split()[:20]) if chance.random() < 0.3 else None
        text = whole.partition(stop)[0] if stop else whole
        cancel_at = chance.randrange(len(whole)) if chance.random() < 0.2 else None
        options = pb.GenerationOptions(
            sampling=generation_pb2.SamplingParams(seed=seed),
            stopping=generation_pb2.StoppingParams(max_tokens=num_tokens, ignore_eos=True),
            stop=[stop] if stop else [],
        )
        request = pb.GatewayServiceGenerateStreamRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt), options=options
        )
        metadata = (("x-nanoinfer-tenant", chance.choice("abc")),)
        timeout = chance.uniform(0.01, 0.3) if chance.random() < 0.15 else 120.0
        call = self.stack.gateway.stub.GenerateStream(request, timeout=timeout, metadata=metadata)
        received, outcome = "", "complete"
        try:
            async for message in call:
                received += "".join(delta.text for delta in message.deltas)
                if cancel_at is not None and len(received) > cancel_at:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name
        except asyncio.CancelledError:
            outcome = "CANCELLED"
        self.outcomes[outcome] += 1
        assert text.startswith(received), (received, text)
        assert outcome != "complete" or received == text, (received, text)

    async def visits(self, ends: float) -> None:
        while time.monotonic() < ends:
            await self.visit()


async def crowd(stack: SmallStack, seed: int, seconds: float) -> Counter[str]:
    """The outcomes of many visitors at a time; all is quiet afterwards."""
    ends = time.monotonic() + seconds
    visitors = [Visitor(stack, random.Random(seed + i)) for i in range(NUM_CLIENTS)]
    await asyncio.gather(*(visitor.visits(ends) for visitor in visitors))
    await stack.engine.idle()
    return sum((visitor.outcomes for visitor in visitors), Counter())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.matrix("R87")
async def test_a_minute_of_everything_leaves_nothing_behind(tmp_path: Path) -> None:
    runner = FakeRunner(num_blocks=40, max_model_len=128, step_seconds=0.001)  # 160 tokens
    async with small_stack(tmp_path, runner, ENGINE, {"max_requests": 64}) as stack:
        await crowd(stack, 1, SOAK_SECONDS / 6)  # every buffer has been used once
        runner.batches.clear()
        runner.began.clear()
        before = held()
        outcomes: Counter[str] = Counter()
        for part in range(5):
            outcomes += await crowd(stack, 100 * part, SOAK_SECONDS / 6)
            runner.batches.clear()  # the fake's own notes
            runner.began.clear()
        after = held()
        engine = stack.engine.service._engine
        pool = engine._scheduler._tables._pool
        assert sorted([*pool._free, *pool._kept]) == list(range(pool.num_blocks))
        assert engine.statistics.counters["preemptions"] > 0
        finished = engine.statistics.finished
        assert engine.statistics.counters["accepted"] == sum(finished.values())
    assert set(outcomes) == {"complete", "CANCELLED", "DEADLINE_EXCEEDED"}
    assert after.tasks <= before.tasks
    assert after.descriptors <= before.descriptors
    assert after.memory <= before.memory + MEMORY_MARGIN


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.matrix("R87")
def test_a_real_model_gives_every_stream_its_own_tokens() -> None:
    command = [sys.executable, "benchmarks/soak.py", "--model", str(GUIDE), "--cases", "12"]
    command += ["--minutes", str(SOAK_SECONDS / 60), "--max-tokens", "32"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    figures = json.loads(done.stdout)
    assert figures["first_failures"] == []
    assert done.returncode == 0
    assert figures["preemptions"] > 0
    assert set(figures["streams"]) >= {"complete", "CANCELLED"}
