"""The fused decoder alone: which tokens the last layer carries, and what it remembers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.progress import report_nothing
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.models import build_model, checkpoint_layout
from nanoinfer_engine.ops.collectives import ALONE
from nanoinfer_engine.ops.cuda.choices import ChoiceFile
from nanoinfer_engine.ops.kv_cache import KVCache
from nanoinfer_engine.ops.quantization import quantizer
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from nanoinfer_engine.weights.loading import load_weights
from torch import Tensor

from tests.engine.tiny_checkpoints import VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.gpu

GREEDY = SamplingOptions(0.0, 0, 1.0, 0.0, 0)
BLOCK_SIZE = 16


def make_decoder(path: Path, device: torch.device, quantization: str = "none") -> Any:
    from nanoinfer_engine.models.fused import FusedDecoder
    from nanoinfer_engine.ops.cuda.attention import PagedAttention
    from nanoinfer_engine.ops.cuda.kernels.decode import DecodeWorkspace

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = build_model(config, 128, dtype, device)
    quantize = quantizer(quantization, model)
    load_weights(model, checkpoint, checkpoint_layout(config), device, report_nothing, quantize)
    for each in model.parameters():
        each.data = each.data.contiguous()  # as on a GPU; `weights` lays it out for MKL
    cache = KVCache(config, 8, BLOCK_SIZE, dtype, device)
    workspace = DecodeWorkspace(4, config.num_heads, config.num_kv_heads, config.head_dim, device)
    backend = PagedAttention(cache, config.sliding_windows, workspace)
    return FusedDecoder(model, config, backend, ALONE, config.vocab_size)  # type: ignore[arg-type]


def prompt_row(length: int, first_block: int) -> BatchRow:
    source = random.Random(length)
    tokens = tuple(source.randrange(VOCAB_SIZE) for _ in range(length))
    blocks = tuple(range(first_block, first_block - (-length // BLOCK_SIZE)))
    return BatchRow(tokens, 0, blocks, True, GREEDY)


@torch.inference_mode()
def step(decoder: Any, rows: list[BatchRow], device: torch.device, kept: list[int] | None) -> Any:
    """What the layers leave of the rows' tokens, or of the `kept` ones."""
    from nanoinfer_engine.models.fused_layer import StepTokens
    from nanoinfer_engine.step.device_inputs import mixed_layout, upload

    inputs = upload(mixed_layout(rows, {}, {}, BLOCK_SIZE), device, lambda: None)
    sampled = torch.zeros(4, dtype=torch.int32, device=device)
    tokens = StepTokens(inputs.token_ids, inputs.sources, sampled)
    wanted = None if kept is None else torch.tensor(kept, dtype=torch.int32, device=device)
    return decoder.forward(tokens, inputs.plan, kept=wanted)


def logits(decoder: Any, hidden: Any) -> Tensor:
    with torch.inference_mode():
        return decoder.logits(hidden).double().cpu()  # type: ignore[no-any-return]


def close(actual: Tensor, expected: Tensor, bound: float) -> bool:
    return float((actual - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("kept", [[], [11], [40, 3, 41, 11]])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_last_layer_of_kept_tokens_alone(
    quantization: str, kept: list[int], device: torch.device, tmp_path: Path
) -> None:
    path = make_checkpoint("llama3", tmp_path)
    rows = [prompt_row(12, 0), prompt_row(30, 2)]
    if quantization == "fp8":  # more rows than our own kernels multiply, so 8 bits on both sides
        rows.append(prompt_row(40, 4))
    whole, cut = (make_decoder(path, device, quantization) for _ in range(2))
    expected = logits(whole, step(whole, rows, device, None))
    hidden = step(cut, rows, device, kept)
    assert hidden.residual.shape[0] == len(kept)
    # few rows multiply activations of 16 bits, many of 8
    bound = 5e-3 if quantization == "none" else 0.2
    if kept:
        assert close(logits(cut, hidden), expected[kept], bound)
    # what is in the cache is the same: the first prompt goes on
    later = rows[0]._replace(token_ids=(5,), start=12, block_ids=(0,))
    following = [logits(each, step(each, [later], device, None)) for each in (cut, whole)]
    assert close(*following, 1e-6)


def test_choices_come_back(device: torch.device, tmp_path: Path) -> None:
    from nanoinfer_engine.models.fused import PRODUCTS
    from nanoinfer_engine.ops.cuda.kernels.cublaslt import Algorithm
    from nanoinfer_engine.ops.cuda.kernels.decode import AttentionShape
    from nanoinfer_engine.ops.cuda.kernels.linear import GemvShape, TileShape

    path = make_checkpoint("llama3", tmp_path / "model")
    first, second = (make_decoder(path, device) for _ in range(2))
    one_product = {
        1: GemvShape(1, 512, 1),
        16: TileShape(16, 256, 1, 2, 4),
        64: Algorithm(15, 2, 0, bytes(range(64))),
        128: None,
    }
    first.table.choices = {name: dict(one_product) for name in PRODUCTS}
    first._backend.shapes = {8: AttentionShape(64, 4, 3, True, 512)}
    kinds = (GemvShape, TileShape, Algorithm, AttentionShape)
    ChoiceFile(tmp_path, {"device": "a"}, kinds).write(first.choices)
    choices = ChoiceFile(tmp_path, {"device": "a"}, kinds).read()
    assert choices is not None
    assert second.restore(choices)
    assert second.choices == first.choices
    assert second.table.choice("down", 40) == one_product[64]
    assert not second.restore({**choices, "more": {}})
    assert not second.restore({})
