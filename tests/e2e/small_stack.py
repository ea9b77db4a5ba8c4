"""A gateway and an engine in this event loop, on a runner without a model and a fake tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.control.conftest import Engine, start_engine
from tests.engine.fakes import VOCAB_SIZE, FakeRunner
from tests.gateway.fakes import SPECIAL, FakeTokenizer, Gateway, gateway, serving

# the text of a completion is its ids in base 10, a word each
TOKENS = tuple(f" {number}".encode() for number in range(VOCAB_SIZE))


@dataclass(frozen=True)
class SmallStack:
    """The running services and what they run on."""

    gateway: Gateway
    engine: Engine
    tokenizer: FakeTokenizer
    runner: FakeRunner


def words(ids: list[int]) -> str:
    """The text of these ids; a special token has none."""
    return b"".join(TOKENS[token_id] for token_id in ids if token_id != SPECIAL).decode()


@asynccontextmanager
async def small_stack(
    directory: Path, runner: FakeRunner, engine: dict[str, Any], edge: dict[str, Any]
) -> AsyncIterator[SmallStack]:
    """Starts them; `engine` and `edge` are settings of the engine and the gateway."""
    tokenizer = FakeTokenizer(tokens=TOKENS)
    chosen = {"model": directory, "model_name": "fake", "block_size": runner.block_size, **engine}
    async with (
        serving(tokenizer) as one,
        start_engine(lambda config, progress: runner, **chosen) as two,
        gateway([one.address], [two.server.address], **edge) as three,
    ):
        yield SmallStack(three, two, tokenizer, runner)
