"""A runner without a model: it keeps a paged memory of token ids and hashes what a row may see.

The token it samples depends on every token of the context, read back through the row's block ids.
So a block that is lost, shared or reused too early changes the tokens, as it would with a real
KV cache, and `expected_tokens` says what a request alone on the machine would get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from nanoinfer_engine.core.batch import Batch, BatchRow, FinishedStep, RowResult, Step
from nanoinfer_engine.core.config import EngineConfig, ModelConfig, RopeConfig
from nanoinfer_engine.core.request import (
    Logprob,
    Request,
    RequestOutput,
    RequestTimes,
    SampledToken,
    SamplingOptions,
    StoppingOptions,
)
from nanoinfer_engine.core.stream import Stream

VOCAB_SIZE = 1000
EOS = 2


def next_token(context: Sequence[int], seed: int = 0, masked: frozenset[int] = frozenset()) -> int:
    """The fake model: a hash of the whole context, away from special ids below 10."""
    value = seed & 0xFFFF
    for token_id in context:
        value = (value * 1_000_003 + token_id + 1) & 0xFFFFFFFF
    token_id = 10 + value % (VOCAB_SIZE - 10)
    while token_id in masked:
        token_id = 10 + (token_id - 9) % (VOCAB_SIZE - 10)
    return token_id


def expected_tokens(prompt: Sequence[int], num_tokens: int, seed: int = 0) -> list[int]:
    """What `FakeRunner` gives a request with this prompt, whoever else runs."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context, seed))
    return context[len(prompt) :]


async def pieces(stream: Stream) -> AsyncIterator[list[RequestOutput]]:
    """What piles up in a stream, taken at once each time."""
    while await stream.wait():
        yield stream.take()


class FakeRunner:
    """Satisfies `Runner`, and what the service reads of a `ModelRunner` besides."""

    vocab_size = VOCAB_SIZE
    num_parameters = 0
    weights_fingerprint = "ab" * 32
    number_format = "float32"
    model_config = ModelConfig(
        model_type="fake",
        topology="decoder",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        norm_eps=1e-5,
        activation="silu",
        tie_word_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        norm_bias=False,
        qk_norm=False,
        sliding_windows=(None,),
        rope=RopeConfig(),
    )

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 256,
        step_seconds: float = 0.0,
        window: int | None = None,
    ) -> None:
        """`window` bounds the context that a token depends on, for long runs."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.step_seconds = step_seconds
        self.window = window
        self.batches: list[Batch] = []
        self.began: list[int] = []  # monotonic nanoseconds of each step
        self.fail_step: Exception | None = None
        self.fail_row: Callable[[BatchRow], Exception | None] = lambda row: None
        self.forced: dict[int, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self._memory: dict[int, int] = {}

    def warm_up(self) -> float:
        return 0.0

    runs_ahead = False

    def launch(self, batch: Batch) -> Step:
        return FinishedStep(self.execute(batch))

    def execute(self, batch: Batch) -> list[RowResult]:
        self.batches.append(batch)
        self.began.append(time.monotonic_ns())
        self.gate.wait(60)
        time.sleep(self.step_seconds)
        if self.fail_step is not None:
            error, self.fail_step = self.fail_step, None
            raise error
        for row in batch.rows:
            for position, token_id in enumerate(row.token_ids, row.start):
                self._memory[self._slot(row, position)] = token_id
        return [self._sample(row) for row in batch.rows]

    def _slot(self, row: BatchRow, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + (
            position % self.block_size
        )

    def _sample(self, row: BatchRow) -> RowResult:
        if error := self.fail_row(row):
            return error
        if not row.samples:
            return ()
        first = max(0, row.context_length - self.window) if self.window else 0
        context = [self._memory[self._slot(row, i)] for i in range(first, row.context_length)]
        token_id = next_token(context, row.sampling.seed, row.masked_token_ids)
        forced = self.forced.get(row.context_length)
        if forced is not None and forced not in row.masked_token_ids:
            token_id = forced
        if row.sampling.num_logprobs is None:
            return (SampledToken(token_id),)
        top = tuple(Logprob(i, -1.0 - i, i + 1) for i in range(row.sampling.num_logprobs))
        return (SampledToken(token_id, Logprob(token_id, -0.5, 1), top),)


@dataclass
class FakeListener:
    """Remembers what the engine told."""

    stalls: list[bool]
    lost_with: BaseException | None = None

    def stalled(self, is_stalled: bool) -> None:
        self.stalls.append(is_stalled)

    def lost(self, error: BaseException) -> None:
        self.lost_with = error


class FakeClock:
    """Monotonic nanoseconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


GREEDY = SamplingOptions(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def make_config(tmp_path: object = "unused", **changes: object) -> EngineConfig:
    """A small engine: 16 tokens and 4 requests a step, blocks of 4 tokens."""
    small = EngineConfig(
        model_path=tmp_path,  # type: ignore[arg-type]
        block_size=4,
        max_batch_tokens=16,
        max_batch_requests=4,
        max_waiting_requests=8,
        max_waiting_tokens=400,
    )
    return replace(small, **changes)  # type: ignore[arg-type]


def make_request(
    prompt: Sequence[int] = (11, 12, 13),
    max_tokens: int = 4,
    *,
    min_tokens: int = 0,
    stop: Sequence[int] = (),
    include_stop: bool = False,
    priority: int = 0,
    deadline: int | None = None,
    seed: int = 0,
    index: int = 0,
    num_logprobs: int | None = None,
    tenant: str = "",
    cache_salt: str | None = None,
    num_bytes: int = 0,
) -> Request:
    """A request with the defaults of a test."""
    return Request(
        request_id="test",
        index=index,
        prompt_token_ids=tuple(prompt),
        sampling=replace(GREEDY, seed=seed, num_logprobs=num_logprobs),
        stopping=StoppingOptions(
            max_tokens, min_tokens, frozenset(stop), frozenset({EOS}), include_stop
        ),
        times=RequestTimes(arrived=time.monotonic_ns()),
        priority=priority,
        tenant=tenant,
        deadline=deadline,
        cache_salt=cache_salt,
        num_bytes=num_bytes,
    )
