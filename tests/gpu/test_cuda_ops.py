"""The decoder over CUDA operations: against the reference, and the last layer of kept tokens."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.core.progress import report_nothing
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.models import build_model, checkpoint_layout
from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.ops.kv_cache import KVCache
from nanoinfer_engine.ops.linear import linear_format
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from nanoinfer_engine.weights.loading import load_weights
from torch import Tensor

from tests.engine.compute.driver import AllLogits
from tests.engine.tiny_checkpoints import VOCAB_SIZE, make_checkpoint
from tests.gpu.interpreted import INTERPRETED

pytestmark = pytest.mark.gpu

KINDS = ["llama3", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2", "nanogpt"]
GREEDY = SamplingOptions(0.0, 0, 1.0, 0.0, 0)
BLOCK_SIZE = 16


@dataclass
class DeviceModel:
    """A loaded model with CUDA operations over a cache of its own."""

    model: Any
    ops: Any
    cache: KVCache

    @property
    def device(self) -> torch.device:
        return self.cache.device

    @torch.inference_mode()
    def step(self, rows: list[BatchRow], kept: list[int] | None) -> Any:
        """What the layers leave of the rows' tokens, or of the `kept` ones."""
        from nanoinfer_engine.ops.cuda.backend import CudaStep
        from nanoinfer_engine.step.device_inputs import mixed_layout, upload

        inputs = upload(mixed_layout(rows, {}, {}, BLOCK_SIZE), self.device, lambda: None)
        sampled = torch.zeros(4, dtype=torch.int32, device=self.device)
        step = CudaStep(inputs.token_ids, inputs.sources, sampled, inputs.plan)
        wanted = None if kept is None else torch.tensor(kept, device=self.device).int()
        return self.model(self.ops, step, wanted)

    @torch.inference_mode()
    def logits(self, stream: Any) -> Tensor:
        """[rows, vocabulary], on the host."""
        return self.model.logits(self.ops, stream).double().cpu()  # type: ignore[no-any-return]


def cuda_ops(
    config: ModelConfig,
    cache: KVCache,
    rank: Rank = ALONE,
    vocab_size: int | None = None,
    table: Any = None,
) -> Any:
    """Operations for four rows; `config` is of the rank's share."""
    from nanoinfer_engine.ops.cuda.attention import PagedAttention
    from nanoinfer_engine.ops.cuda.backend import PDL_ROWS, CudaOps
    from nanoinfer_engine.ops.cuda.kernels.decode import AttentionShape, DecodeWorkspace
    from nanoinfer_engine.ops.cuda.products import TuningTable

    # a row's context is split on both; in the interpreter over few programs
    few = {(2, 16): {4: AttentionShape(32, 4, 3, False, 8)}} if INTERPRETED else {}
    table = table or TuningTable({}, few)
    kv_heads, dim = config.num_kv_heads, config.head_dim
    workspace = DecodeWorkspace(4, config.num_heads, kv_heads, dim, cache.device)
    attention = PagedAttention(
        cache,
        config.sliding_windows,
        workspace,
        lambda rows: table.attention_shape(kv_heads, dim, rows),
    )
    # the interpreter has no dependent launch
    pdl_rows = PDL_ROWS if cache.device.type == "cuda" else 0
    ids = vocab_size or config.vocab_size
    return CudaOps(attention, table, cache.dtype, rank, ids, pdl_rows)


def make_model(path: Path, device: torch.device, quantization: str = "none") -> DeviceModel:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = build_model(config, 128, dtype, device, linear_format(quantization))
    load_weights(model, checkpoint, checkpoint_layout(config), device, report_nothing)
    for each in model.parameters():
        each.data = each.data.contiguous()  # as on a GPU; on a CPU it is laid out for MKL
    cache = KVCache(config, 8, BLOCK_SIZE, dtype, device)
    return DeviceModel(model, cuda_ops(config, cache), cache)


def prompt_row(length: int, first_block: int) -> BatchRow:
    source = random.Random(length)
    tokens = tuple(source.randrange(VOCAB_SIZE) for _ in range(length))
    blocks = tuple(range(first_block, first_block - (-length // BLOCK_SIZE)))
    return BatchRow(tokens, 0, blocks, True, GREEDY)


def close(actual: Tensor, expected: Tensor, bound: float) -> bool:
    return float((actual - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("kept", [[], [11], [40, 3, 41, 11]])
@pytest.mark.parametrize("quantization", ["none", "fp8", "int8"])
def test_the_last_layer_of_kept_tokens_alone(
    quantization: str, kept: list[int], device: torch.device, tmp_path: Path
) -> None:
    path = make_checkpoint("llama3", tmp_path)
    rows = [prompt_row(12, 0), prompt_row(30, 2)]
    if quantization == "fp8":  # more rows than our own kernels multiply, so 8 bits on both sides
        rows.append(prompt_row(40, 4))
    whole, cut = (make_model(path, device, quantization) for _ in range(2))
    expected = whole.logits(whole.step(rows, None))
    stream = cut.step(rows, kept)
    assert stream.residual.shape[0] == len(kept)
    # few rows multiply activations of 16 bits, many of 8
    bound = 0.2 if quantization == "fp8" else 5e-3
    if kept:
        assert close(cut.logits(stream), expected[kept], bound)
    # what is in the cache is the same: the first prompt goes on
    later = rows[0]._replace(token_ids=(5,), start=12, block_ids=(0,))
    following = [each.logits(each.step([later], None)) for each in (cut, whole)]
    assert close(*following, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_of_both_devices_agree(
    kind: str, device: torch.device, tmp_path: Path
) -> None:
    path = make_checkpoint(kind, tmp_path)
    reference, model = AllLogits(path, BLOCK_SIZE, 8), make_model(path, device)
    rows = [prompt_row(12, 0), prompt_row(30, 2)]
    steps = [rows, [row._replace(token_ids=(5,), start=len(row.token_ids)) for row in rows]]
    steps.append([steps[1][0]._replace(start=13)])
    bound = 5e-3 if device.type == "cuda" else 1e-5
    for step in steps:
        expected = torch.cat(reference.step(step)).double()
        assert close(model.logits(model.step(step, None)), expected, bound)


def test_a_table_is_read_back_and_the_nearest_size_serves() -> None:
    from nanoinfer_engine.ops.cuda.kernels.decode import AttentionShape
    from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, TileShape
    from nanoinfer_engine.ops.cuda.products import (
        ProductKind,
        TuningTable,
        table_from_json,
        table_to_json,
    )

    small = ProductKind(1024, 1024, False, True, False)
    large = ProductKind(4096, 4096, False, True, False)
    split = TileShape(32, 128, 4, 4, 4)
    table = TuningTable(
        {
            small: {1: GemvShape(1, 512, 1), 8: split, 64: None},
            large: {1: GemvShape(1, 4096, 4), 8: TileShape(64, 128, 1, 4, 4), 64: split},
        },
        {(8, 128): {1: AttentionShape(64, 4, 3, True, 512), 8: AttentionShape(32, 4, 3, False, 9)}},
    )
    again = table_from_json(json.loads(json.dumps(table_to_json(table))))
    assert (again.products, again.attention) == (table.products, table.attention)
    near = replace(small, outputs=1100)
    assert again.gemv(near) == GemvShape(1, 512, 1)
    assert again.tile(near, 7) == split
    assert again.tile(near, 60) is None
    assert again.tile(replace(large, inputs=4000), 60) is None  # 4,000 is no multiple of the tile
    assert again.tile(replace(small, joins=False), 8) == TileShape(64, 128, 1, 4, 4)
    assert again.tile(small, 65) is None
    assert again.gemv(replace(large, inputs=1000)) == GemvShape(1, 512, 1)
    assert again.gemv(replace(small, inputs=100)) is None
    assert again.attention_shape(4, 64, 5) == AttentionShape(32, 4, 3, False, 9)
    assert again.attention_shape(4, 64, 50) == AttentionShape(32, 4, 3, False, 9)
    assert table.attention_shape(8, 128, 1) == AttentionShape(64, 4, 3, True, 512)


def test_a_card_without_a_table_takes_anothers_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from nanoinfer_engine.ops.cuda.products import read_table

    own = read_table("NVIDIA H200")
    assert not caplog.messages
    other = read_table("Another Card")
    assert other.products == own.products
    assert "benchmarks/tune.py" in caplog.text
