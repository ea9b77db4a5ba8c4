"""FP8 on the card against FP16 there and FP8 on the CPU: logits, tokens, graphs, room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nanoinfer_engine.core.batch import Batch, BatchRow
from nanoinfer_engine.step.runner import ModelRunner
from torch import Tensor

from tests.gpu.test_runner import GREEDY, eager_logits, generate, make_runner, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = {
    "weights": {"quantization": "fp8"},
    "cache": {"kv_cache_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
ROWS = 96  # more than our own kernels multiply
BOUND = 1.2e-1  # 0.07 of W8A8 weights on the CPU over many tokens; single ones spread widely


@pytest.fixture(scope="module")
def plain() -> ModelRunner:
    runner = make_runner("cuda", "float16", max_batch_requests=ROWS)
    runner.warm_up()
    return runner


@pytest.fixture(scope="module", params=SETTINGS)
def quantized(request: pytest.FixtureRequest) -> ModelRunner:
    runner = make_runner("cuda", "float16", max_batch_requests=ROWS, **SETTINGS[request.param])
    runner.warm_up()
    return runner


def steps_of(runner: ModelRunner) -> Any:
    assert runner._steps is not None
    return runner._steps


def logits_of(runner: ModelRunner, chunks: list[list[BatchRow]]) -> list[Tensor]:
    """Logits of each step."""
    return eager_logits(runner, [Batch(tuple(rows)) for rows in chunks])


def rows_at(start: int, stop: int, count: int) -> list[BatchRow]:
    """`count` rows of the same tokens, blocks of 16 side by side."""
    tokens = prompts(1, 5, 4000)[0] * 8
    return [
        BatchRow(
            tuple(tokens[row + start : row + stop]),
            start,
            tuple(range(row * 20, row * 20 + -(-stop // 16))),
            True,
            GREEDY,
        )
        for row in range(count)
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("count", [1, 5, 24, 80])
def test_logits_against_float16(plain: ModelRunner, quantized: ModelRunner, count: int) -> None:
    """A prompt, a chunk behind it, and decode steps: every kind of product."""
    steps = [[row] for row in rows_at(0, 100, count)]
    steps += [[row] for row in rows_at(100, 130, count)]
    steps += [rows_at(start, start + 1, count) for start in range(130, 142)]
    expected = logits_of(plain, steps)
    actual = logits_of(quantized, steps)
    assert len(actual) == len(steps)
    assert 0 < relative_error(torch.cat(actual), torch.cat(expected)) < BOUND
    # a decode step that read the cache wrongly would stand out
    last = [torch.cat(each[-12:]) for each in (actual, expected)]
    assert relative_error(last[0], last[1]) < BOUND


def test_tokens_equal_those_of_the_same_arithmetic_on_the_cpu(quantized: ModelRunner) -> None:
    settings = {
        "quantization": quantized._config.quantization,
        "kv_cache_dtype": quantized._config.kv_cache_dtype,
    }
    cpu = make_runner("cpu", "float32", **settings)
    texts = prompts(16, 21)
    ours, theirs = generate(quantized, texts, 8), generate(cpu, texts, 8)
    # random prompts leave many near ties, and few rows multiply activations of 16 bits
    assert sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)) >= 11


@pytest.mark.parametrize("count", [1, 8, 60, 90])
def test_graphs_equal_eager_at_the_same_padded_size(quantized: ModelRunner, count: int) -> None:
    texts = prompts(count, 11)
    with_graphs = generate(quantized, texts, 20, max_batch_requests=ROWS)
    steps = steps_of(quantized)
    assert steps.graphs.can_replay(count)
    replay = steps.graphs.replay
    steps.graphs.replay = lambda n: steps.run_decode(steps.graphs.padded(n))
    try:
        eager = generate(quantized, texts, 20, max_batch_requests=ROWS)
    finally:
        steps.graphs.replay = replay
    assert with_graphs == eager


def test_an_fp8_cache_holds_twice_the_tokens(plain: ModelRunner) -> None:
    runner = make_runner("cuda", "float16", kv_cache_dtype="fp8")
    assert runner.num_blocks == 2 * plain.num_blocks


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes(dtype: str, plain: ModelRunner) -> None:
    runner = make_runner("cuda", dtype, quantization="fp8", kv_cache_dtype="fp8")
    runner.warm_up()
    texts = prompts(8, 12)
    first = [tokens[0] for tokens in generate(runner, texts, 12)]
    expected = [tokens[0] for tokens in generate(plain, texts, 12)]
    assert sum(a == b for a, b in zip(first, expected, strict=True)) >= 5
