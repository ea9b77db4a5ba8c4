"""Steps with prompts at fixed sizes: padding changes nothing, and a replay is what it replays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.request import SamplingOptions

from tests.engine.tiny_checkpoints import VOCAB_SIZE, make_checkpoint
from tests.gpu.test_cuda_ops import BLOCK_SIZE, GREEDY, close, make_model

pytestmark = pytest.mark.gpu

MAX_ROWS, MAX_BLOCKS = 20, 4
SAMPLED = SamplingOptions(0.8, 20, 0.9, 0.05, 7)


class AnySize:
    """In the place of captured steps, where nothing is captured: every size is there."""

    def __contains__(self, key: object) -> bool:
        return True


class Recorded(AnySize):
    """Takes the first `most` keys."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.keys: list[Any] = []

    def capture(self, key: object, run: object) -> bool:
        self.keys.append(key)
        return len(self.keys) < self._most


def row(length: int, start: int, blocks: tuple[int, ...], **more: object) -> BatchRow:
    source = random.Random(100 * length + start)
    tokens = tuple(source.randrange(VOCAB_SIZE) for _ in range(length))
    sampling = SAMPLED if blocks[0] % 2 else GREEDY
    return BatchRow(tokens, start, blocks, True, sampling, **more)  # type: ignore[arg-type]


# each has its blocks filled first by prompts that begin alike
PROMPTS = [row(20, 0, (0, 1)), row(9, 0, (2,)), row(31, 0, (3, 4))]
STEPS = [
    [row(12, 0, (5,))],
    [row(1, 9, (2,)), row(3, 20, (0, 1)), row(1, 31, (3, 4)), row(16, 0, (6,))],
    [row(0, 9, (2,), source_row=1), row(40, 0, (5, 6, 7))],
    [row(1, 20, (0, 1)), row(7, 9, (2,))._replace(samples=False)],
    [row(1, 16, (5, 6)), row(16, 0, (5,)), row(1, 31, (3, 4)), row(9, 0, (7,))],
    [row(3, 9, (2,))._replace(samples=False), row(5, 20, (0, 1))._replace(samples=False)],
]


@torch.inference_mode()
def run(
    decoder: Any, device: torch.device, rows: list[BatchRow], *, fixed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids of the rows that sample, laid out for the step alone or at a fixed size."""
    from nanoinfer_engine.ops.cuda.backend import CudaStep
    from nanoinfer_engine.ops.cuda.kernels.sampling import SamplingWorkspace, choose
    from nanoinfer_engine.step.device_inputs import mixed_layout, upload
    from nanoinfer_engine.step.mixed_graphs import MixedGraphs

    layout = mixed_layout(rows, {1: 0}, {}, BLOCK_SIZE)
    if fixed:
        graphs = MixedGraphs(AnySize(), MAX_ROWS, 64, MAX_BLOCKS, device)  # type: ignore[arg-type]
        size = graphs.size(layout, rows)
        assert size is not None
        graphs.fill(size, layout, lambda: None)
        inputs = graphs.inputs(size)
    else:
        inputs = upload(layout, device, lambda: None)
    sampled = torch.full((MAX_ROWS,), 5, dtype=torch.int32, device=device)
    step = CudaStep(inputs.token_ids, inputs.sources, sampled, inputs.plan)
    stream = decoder.model(decoder.ops, step, inputs.sampled_tokens)
    if not len(inputs.sampled_tokens):
        return torch.empty(0), torch.empty(0)
    logits = decoder.model.logits(decoder.ops, stream)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    workspace = SamplingWorkspace(MAX_ROWS, logits.shape[1], device)
    choose(logits.to(dtype), inputs.sampling, workspace, sampled)
    count = len(layout.sampled_rows)
    return logits[:count].double().cpu(), sampled[:count].cpu()


@pytest.mark.parametrize("rows", STEPS, ids=["prompt", "mixed", "ahead", "chunk", "late", "silent"])
def test_padding_changes_nothing(
    rows: list[BatchRow], device: torch.device, tmp_path: Path
) -> None:
    path = make_checkpoint("llama3", tmp_path)
    plain, padded = (make_model(path, device) for _ in range(2))
    for decoder in (plain, padded):
        run(decoder, device, PROMPTS, fixed=False)
    expected, chosen = run(plain, device, rows, fixed=False)
    actual, ids = run(padded, device, rows, fixed=True)
    assert len(actual) == sum(each.samples for each in rows)
    if len(actual):
        assert close(actual, expected, 1e-3 if device.type == "cuda" else 1e-6)
    assert ids.tolist() == chosen.tolist()
    # what is in the cache is the same, and nothing else was written
    later = [each._replace(token_ids=(7,), start=each.context_length) for each in PROMPTS]
    after = [run(decoder, device, later, fixed=False)[0] for decoder in (plain, padded)]
    assert close(*after, 1e-3 if device.type == "cuda" else 1e-6)
    caches = [decoder.cache for decoder in (plain, padded)]
    touched = {block for each in (*PROMPTS, *rows) for block in each.block_ids}
    for layer in range(2):
        for one, other in zip(*(cache.layer(layer) for cache in caches), strict=True):
            for block in set(range(8)) - touched:
                assert torch.equal(one[block], other[block])


def test_sizes(device: torch.device) -> None:
    from nanoinfer_engine.step.device_inputs import mixed_layout
    from nanoinfer_engine.step.mixed_graphs import MAX_PROMPTS, MixedGraphs, MixedSize

    graphs = MixedGraphs(AnySize(), 256, 8192, 13, device)  # type: ignore[arg-type]

    def size(*rows: BatchRow) -> MixedSize | None:
        return graphs.size(mixed_layout(rows, {}, {}, BLOCK_SIZE), rows)

    decode, prompt = row(1, 9, (2,)), row(40, 0, (5, 6, 7))
    assert size(prompt) == MixedSize(64, 0)
    assert size(prompt, prompt) == MixedSize(128, 0)
    assert size(decode, prompt) == MixedSize(64, 16)
    assert size(*[decode] * 17, prompt) == MixedSize(128, 64)
    assert size(*[decode] * 200, prompt) == MixedSize(320, 256)
    assert size(*[decode] * 3) is None  # no prompt
    assert size(*[row(2, 0, (2,))] * (MAX_PROMPTS + 1)) is None
    full = [row(64, 0, (2, 3, 4, 5))] * 31
    assert size(*full, row(64, 0, (2, 3, 4, 5))) == MixedSize(2048, 0)
    # as many tokens as a step beside decodes may have: rows from 65 on are padded to 128
    assert size(*[decode] * 65, *full[1:], row(63, 0, (5, 6, 7, 8))) == MixedSize(2176, 128)
    assert size(row(200, 0, tuple(range(13))), *full) is None
    assert size(prompt._replace(scored_token_ids=prompt.token_ids[1:])) is None
    # of the most tokens that a step may have some are decode rows, and those are padded
    graphs = MixedGraphs(AnySize(), 64, 512, 13, device)  # type: ignore[arg-type]
    assert size(*[decode] * 5, *full[:7], row(59, 0, (5, 6, 7, 8))) == MixedSize(576, 16)
    # tables are as wide as rows may be, but no wider than pays
    graphs = MixedGraphs(AnySize(), 256, 8192, 4096, device)  # type: ignore[arg-type]
    assert size(prompt) == MixedSize(64, 0)
    assert size(row(40, 0, tuple(range(1025)))) is None


def test_sizes_that_hide_their_launches_are_not_captured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanoinfer_engine.step import mixed_graphs

    captured = Recorded(most=20)
    graphs = mixed_graphs.MixedGraphs(captured, 64, 8192, 4, device)  # type: ignore[arg-type]
    seen: list[int] = []

    def lag(run: Any) -> float:
        run()
        return seen[-1] / 600

    def launch(inputs: Any) -> torch.Tensor:
        seen.append(len(inputs.token_ids))
        return torch.empty(0)

    monkeypatch.setattr(mixed_graphs, "_device_lag", lag)
    graphs.capture(launch)
    # 1.5 · 600 tokens and more are launched one by one; after 20 there is no memory left
    assert captured.keys == sorted(captured.keys, reverse=True)
    assert len(captured.keys) == 20
    sizes = [(896, 64), (896, 16), (896, 0), (768, 64)]
    assert captured.keys[:4] == [mixed_graphs.MixedSize(*each) for each in sizes]
    assert len(seen) < 8  # they are searched, not tried one after another


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_equal_launches_and_the_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoinfer_engine.step import mixed_graphs

    # capture every size: which ones pay depends on who else uses this machine's cores
    monkeypatch.setattr(mixed_graphs, "_device_lag", lambda run: 1.0)
    from tests.gpu.test_runner import assert_same, generate, make_runner, prompts

    runner = make_runner("cuda", "float16", mixed_graphs=True)
    runner.warm_up()
    steps = runner._steps
    assert steps is not None
    graphs, replayed = steps.mixed_graphs, []
    replay = graphs.replay

    def counted(size: Any) -> torch.Tensor:
        replayed.append(size)
        return replay(size)

    def launched(size: Any) -> torch.Tensor:
        return steps.run_mixed(graphs.inputs(size))[0]  # type: ignore[union-attr]

    texts = prompts(20, 8, longest=700)
    graphs.replay = counted  # type: ignore[method-assign]
    actual = generate(runner, texts, 20)
    graphs.replay = launched  # type: ignore[method-assign]
    assert generate(runner, texts, 20) == actual
    assert len(replayed) > 5
    assert len({size.decode_rows for size in replayed}) > 1
    expected = generate(make_runner("cpu", "float32"), texts, 20)
    assert assert_same(actual, expected, texts) <= 4
