"""Two GPUs against one: logits, tokens, graphs, memory; shares by kernels on the CPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.progress import report_nothing
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.models import checkpoint_layout
from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.ops.kv_cache import KVCache
from nanoinfer_engine.parallel.ranks import ParallelRunner
from nanoinfer_engine.step.runner import ModelRunner
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from nanoinfer_engine.weights.loading import load_weights
from nanoinfer_engine.weights.sharding import take_share

from tests.engine.rank_processes import run_ranks
from tests.gpu.test_runner import GUIDE, assert_same, device_logits, generate, make_runner, prompts

CONFIG = EngineConfig(
    GUIDE, device="cuda", dtype="float16", max_batch_tokens=512, max_batch_requests=64
)
SAMPLED = SamplingOptions(0.8, 50, 0.95, 0.01, 77)

gpu = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def measure(config: EngineConfig, rank: Rank) -> dict[str, object]:
    """What both ranks, and one GPU alone, are compared in."""
    runner = ModelRunner(config, rank=rank)
    weights = sum(each.nbytes for each in runner._model.parameters())
    runner.warm_up()
    (prompt,) = prompts(1, 3)
    steps = runner._steps
    assert steps is not None
    texts = prompts(20, 8)
    return {
        "weights": weights,
        "blocks": runner.num_blocks,
        "fingerprint": runner.weights_fingerprint,
        "graphs": steps.graphs.sizes,
        "mixed graphs": steps.mixed_graphs.sizes,
        "logits": device_logits(runner, prompt),
        "one row": generate(runner, prompts(1, 1), 48),
        "many rows": generate(runner, prompts(40, 40), 12),
        "chunks": generate(runner, prompts(12, 5, longest=700), 24, max_batch_tokens=64),
        "sampled": generate(runner, texts, 30, SAMPLED),
        "with log-probabilities": generate(
            runner, texts[:3], 10, replace(SAMPLED, num_logprobs=1, frequency_penalty=0.2)
        ),
    }


@pytest.fixture(scope="module")
def measured() -> list[dict[str, object]]:
    """Rank 0, rank 1, one GPU."""
    config = replace(CONFIG, kv_cache_bytes=64 << 20)
    return [*run_ranks(measure, config, seconds=170), *run_ranks(measure, config, size=1)]


@gpu
@two_gpus
def test_both_ranks_draw_the_same(measured: list[dict[str, object]]) -> None:
    first, second, _ = measured
    for name in ("one row", "many rows", "chunks", "sampled", "with log-probabilities", "graphs"):
        assert first[name] == second[name], name
    assert first["mixed graphs"] == second["mixed graphs"] == ()  # each would measure for itself
    assert first["blocks"] == second["blocks"]
    assert torch.equal(first["logits"], second["logits"])  # type: ignore[arg-type]


@gpu
@two_gpus
def test_two_gpus_give_the_tokens_of_one(measured: list[dict[str, object]]) -> None:
    pair, _, alone = measured
    assert pair["graphs"] == alone["graphs"]
    assert pair["fingerprint"] == alone["fingerprint"]
    expected, actual = alone["logits"], pair["logits"]
    assert isinstance(expected, torch.Tensor)
    assert isinstance(actual, torch.Tensor)
    assert float((actual - expected).norm() / expected.norm()) < 5e-3
    for name, texts in (
        ("one row", prompts(1, 1)),
        ("many rows", prompts(40, 40)),
        ("chunks", prompts(12, 5, longest=700)),
    ):
        assert_same(pair[name], alone[name], texts)  # type: ignore[arg-type]


@gpu
@two_gpus
def test_each_gpu_has_half_of_the_weights(measured: list[dict[str, object]]) -> None:
    first, second, alone = measured
    assert first["weights"] == second["weights"]
    assert 0.5 <= first["weights"] / alone["weights"] < 0.51  # type: ignore[operator]
    # the same memory for the cache holds twice the tokens, because a token takes half
    assert abs(first["blocks"] - 2 * alone["blocks"]) <= 1  # type: ignore[operator]


@pytest.fixture(scope="module")
def pair() -> Iterator[ParallelRunner]:
    free = {"kv_cache_bytes": None, "device_memory_share": 0.3}
    runner = ParallelRunner(replace(CONFIG, tensor_parallel=2, **free))  # type: ignore[arg-type]
    runner.warm_up()
    yield runner
    runner.close()


@gpu
@two_gpus
def test_the_runner_of_both(pair: ParallelRunner) -> None:
    """Through pipe and processes, with the cache sized from what both devices have free."""
    assert pair.runs_ahead
    assert pair._runner._steps is not None
    assert pair._runner._steps.graphs.can_replay(40)
    texts = prompts(8, 11)
    alone = make_runner("cpu", "float32")
    assert_same(generate(pair, texts, 40), generate(alone, texts, 40), texts)  # type: ignore[arg-type]
    total = torch.cuda.mem_get_info()[1]
    held = pair.num_blocks * pair.block_size * (2 * 6 * 1 * 64 * 2)
    assert 0.15 * total < held < 0.3 * total


def decode(config: EngineConfig, rank: Rank, path: Path, use_gemv: bool) -> list[torch.Tensor]:
    """Logits of decode steps of one row and of three, by CUDA operations."""
    from nanoinfer_engine.ops.cuda.attention import PagedPlan
    from nanoinfer_engine.ops.cuda.backend import CudaStep
    from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape
    from nanoinfer_engine.ops.cuda.products import ProductKind, TuningTable

    from tests.gpu.test_cuda_ops import cuda_ops

    device, dtype = torch.device("cpu"), torch.float32
    checkpoint = open_checkpoint(path)
    share = take_share(checkpoint, rank, 64, dtype, device)
    layout = checkpoint_layout(checkpoint.config)
    load_weights(
        share.model, checkpoint, layout, device, report_nothing, placements=share.placements
    )
    for each in share.model.parameters():
        each.data = each.data.contiguous()  # as on a GPU; `weights` lays it out for MKL
    sizes = share.config
    cache = KVCache(sizes, 8, 16, dtype, device)
    vocab_size = checkpoint.config.vocab_size
    own = {ProductKind(64, 64, False, False, False): {1: GemvShape(2, 64, 1)}} if use_gemv else {}
    ops = cuda_ops(sizes, cache, rank, vocab_size, TuningTable(own, {}))
    source, answers = random.Random(2), []
    sampled = torch.tensor([source.randrange(vocab_size)], dtype=torch.int32)
    with torch.inference_mode():
        for step, rows in enumerate((3, 1, 1)):
            ids = torch.tensor([source.randrange(vocab_size) for _ in range(rows)]).int()
            sources = torch.full((rows,), -1, dtype=torch.int32)
            sources[0] = 0 if step == 2 else -1
            plan = PagedPlan(
                rows,
                torch.arange(rows, dtype=torch.int32).view(rows, 1),
                torch.full((rows,), step + 1, dtype=torch.int32),
                None,
            )
            stream = share.model(ops, CudaStep(ids, sources, sampled, plan))
            answers.append(share.model.logits(ops, stream).clone())
    return answers


@gpu
@pytest.mark.parametrize(("kind", "use_gemv"), [("llama3", False), ("qwen3", True)])
def test_the_shares_give_the_whole(
    kind: str, use_gemv: bool, device: torch.device, tmp_path: Path
) -> None:
    if device.type != "cpu":
        pytest.skip("two devices are tested whole")
    from tests.engine.tiny_checkpoints import make_checkpoint

    path = make_checkpoint(kind, tmp_path)
    config = EngineConfig(path)
    alone = decode(config, ALONE, path, use_gemv)
    first, second = run_ranks(decode, config, path, use_gemv)
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-4
        assert a.std() > 0.1
