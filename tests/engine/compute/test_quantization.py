"""FP8 linears and KV cache: how far from full precision, how loaded, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.config import (
    WEIGHT_FORMATS,
    CheckpointError,
    EngineConfig,
    WeightFormat,
)
from nanoinfer_engine.core.progress import LoadProgress
from nanoinfer_engine.models import Decoder, build_model, checkpoint_layout
from nanoinfer_engine.ops.kv_cache import FP8, KVCache, bytes_per_block, num_blocks_for
from nanoinfer_engine.ops.linear import FORMATS, Fp8Linear, FullLinear, linear_format
from nanoinfer_engine.ops.linear.fp8 import quantize_rows
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_engine.step.runner import check_fp8
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from nanoinfer_engine.weights.loading import load_weights
from torch import Tensor, nn

from tests.engine.compute.driver import GREEDY, AllLogits, Job, make_runner, run
from tests.engine.tiny_checkpoints import make_checkpoint

GUIDE = Path(__file__).resolve().parents[3] / "models" / "guide"
CPU = torch.device("cpu")
KINDS = ["llama3", "qwen3", "phi3", "gpt2", "nanogpt"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def quantized(source: nn.Linear | FullLinear) -> Fp8Linear:
    """The same layer in 8 bits, loaded in two pieces."""
    outputs, inputs = source.weight.shape
    module = Fp8Linear(inputs, outputs, source.weight.dtype, bias=source.bias is not None)
    module.allocate(CPU)
    for first in (0, outputs // 3):
        piece = source.weight[first : outputs // 3 if first == 0 else outputs]
        module.load_rows(first, piece, lambda stored, target: target.copy_(stored))
    if source.bias is not None and module.bias is not None:
        module.bias.copy_(source.bias)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_close_to_the_full_one(dtype: torch.dtype, bias: bool) -> None:
    source = linear(512, 2064, bias)
    x = torch.randn(20, 512)
    expected = source(x)
    output = quantized(source.to(dtype))(x.to(dtype))
    assert output.dtype == dtype
    assert 1e-2 < relative_error(output, expected) < 4e-2


def test_large_channels_and_tokens_cost_nobody_else_precision() -> None:
    source, x = linear(256, 64, bias=False), torch.randn(200, 256)
    source.weight[3] *= 1e4
    x[5] *= 1e4
    expected, actual = source(x), quantized(source)(x)
    for part in ((0, slice(4, None)), (5, slice(4, None)), (slice(6, None), 3)):
        assert relative_error(actual[part], expected[part]) < 6e-2
    plain = nn.Linear(256, 64, bias=False).requires_grad_(False)
    plain.weight.copy_(source.weight)
    plain.weight[3] /= 1e4
    kept = [row for row in range(64) if row != 3]
    assert torch.equal(quantized(source).weight.float(), quantized(plain).weight.float())
    assert torch.equal(quantized(source).scale[kept], quantized(plain).scale[kept])


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.zeros(4, 32)
    x[1, 2], x[2, 3], x[3] = float("nan"), float("-inf"), 1.0
    module = quantized(linear(32, 16, bias=False))
    output = module(x)
    assert not output[0].any()
    assert output[1:3].isnan().all()
    assert output[3].isfinite().all()
    values, scales = quantize_rows(torch.tensor([[60000.0, -30000.0, 1.0]], dtype=torch.float16))
    assert values.float().tolist()[0][:2] == [448.0, -224.0]
    assert scales.shape == (1, 1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_checkpoint(kind, root / kind) for kind in KINDS}


def load(path: Path, scheme: str) -> Iterator[tuple[Decoder, int, str]]:
    """The model after each tensor with the bytes that it takes then, and the fingerprint."""
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    positions, linear = config.max_position_embeddings, linear_format(scheme)
    model = build_model(config, positions, torch.float32, CPU, linear)
    sizes: list[int] = []

    def progress(_progress: LoadProgress) -> None:
        sizes.append(sum(p.nbytes for p in model.parameters() if not p.is_meta))

    fingerprint = load_weights(model, checkpoint, checkpoint_layout(config), CPU, progress)
    for size in sizes:
        yield model, size, fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_linears_are_quantised_as_they_are_loaded(
    kind: str, checkpoints: dict[str, Path]
) -> None:
    plain, _, fingerprint = list(load(checkpoints[kind], "none"))[-1]
    steps = list(load(checkpoints[kind], "fp8"))
    model, final, same_fingerprint = steps[-1]
    assert fingerprint == same_fingerprint
    linears = {n: m for n, m in plain.named_modules() if isinstance(m, FullLinear)}
    assert len(linears) > 4
    for name, full in linears.items():
        module = model.get_submodule(name)
        if name == "head":
            assert isinstance(module, FullLinear)
            assert torch.equal(module.weight, full.weight)
            continue
        assert isinstance(module, Fp8Linear), name
        assert module.weight.dtype == FP8
        assert torch.equal(module.weight.float(), quantized(full).weight.float())
        restored = module.weight.float() * module.scale[:, None]
        assert relative_error(restored, full.weight) < 3e-2
    assert torch.equal(model.embedding.weight, plain.embedding.weight)
    # at no time more than what is there in the end: nothing is kept in full
    assert max(size for _, size, _ in steps) <= final
    assert final < sum(p.nbytes for p in plain.parameters())


def test_a_linear_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path = make_checkpoint("llama2", tmp_path)
    config = replace(open_checkpoint(path).config, intermediate_size=60)
    with pytest.raises(CheckpointError, match=r"layers\.0\.up: 120 × \d+ .* 16"):
        build_model(config, 16, torch.float32, CPU, Fp8Linear)
    with pytest.raises(ValueError, match="int4"):
        make_runner(path, quantization="int4")
    with pytest.raises(ValueError, match="int4"):
        make_runner(path, kv_cache_dtype="int4")


@pytest.mark.parametrize("setting", ["quantization", "kv_cache_dtype"])
def test_a_device_that_does_not_know_fp8_is_refused(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(GUIDE, **{setting: "fp8"})  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ValueError, match=r"8\.9, the device has 8\.6"):
        check_fp8(config, torch.device("cuda"))
    check_fp8(config, CPU)
    check_fp8(EngineConfig(GUIDE), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_fp8(config, torch.device("cuda"))


def facts(count: int) -> list[list[int]]:
    """The first answers of the guide's facts, as ids."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(GUIDE / "tokenizer.json"))
    lines = (GUIDE / "facts" / "nanoinfer.jsonl").read_text().splitlines()[:count]
    return [tokenizer.encode(json.loads(line)["answer"]).ids for line in lines]


def guide_logits(scheme: str, kv: str) -> list[Tensor]:
    model = AllLogits(GUIDE, quantization=scheme, kv_cache_dtype=kv)
    rows = [BatchRow(tuple(ids), 0, tuple(range(50)), True, GREEDY) for ids in facts(6)]
    return [model.step([row])[0] for row in rows]


@pytest.mark.parametrize(
    ("scheme", "kv", "error", "agreement"),
    [("fp8", "auto", 9e-2, 0.93), ("none", "fp8", 4e-2, 0.93), ("fp8", "fp8", 1e-1, 0.92)],
)
def test_logits_of_a_trained_model(scheme: str, kv: str, error: float, agreement: float) -> None:
    expected = torch.cat(guide_logits("none", "auto"))
    actual = torch.cat(guide_logits(scheme, kv))
    assert 1e-3 < relative_error(actual, expected) < error
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > agreement


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_see_of_one_another_what_a_whole_prompt_sees(
    kind: str, checkpoints: dict[str, Path]
) -> None:
    """An 8-bit cache says the same in the step that writes it as in those that read it."""
    ids, blocks = tuple(range(3, 63)), tuple(range(40, 48))
    whole = AllLogits(checkpoints[kind], kv_cache_dtype="fp8")
    (expected,) = whole.step([BatchRow(ids, 0, blocks, True, GREEDY)])
    chunked = AllLogits(checkpoints[kind], kv_cache_dtype="fp8")
    parts = [
        chunked.step([BatchRow(ids[start:stop], start, blocks, True, GREEDY)])[0]
        for start, stop in ((0, 25), (25, 26), (26, 27), (27, 60))
    ]
    # not to the last bit: a key at the border of two codes may fall to either side
    assert relative_error(torch.cat(parts), expected) < 5e-3


def test_greedy_answers_stay_the_same() -> None:
    """Whole, chunked and batched, with everything in 8 bits."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(GUIDE / "tokenizer.json"))
    ids = tokenizer.encode("<|begin|><|user|>What is NanoInfer?<|end|><|assistant|>").ids
    alone = Job(ids, 20)
    run(make_runner(GUIDE), [alone])
    jobs = [Job(ids, 20), Job(ids, 20, chunk=3, starts_at=2)]
    run(make_runner(GUIDE, quantization="fp8", kv_cache_dtype="fp8"), jobs)
    assert [job.tokens for job in jobs] == [alone.tokens, alone.tokens]


def test_an_fp8_cache_rounds_saturates_and_clears() -> None:
    cache = KVCache(open_checkpoint(GUIDE).config, 3, 4, torch.float32, CPU, FP8)
    torch.manual_seed(1)
    keys, values = torch.randn(2, 2, 64), 1000 * torch.randn(2, 2, 64)
    values[1, 1, 5] = float("nan")
    slots = torch.tensor([1, 9])
    seen_keys, seen_values = cache.write(2, slots, keys, values)
    assert 1e-2 < relative_error(seen_keys, keys) < 4e-2
    assert seen_values.nan_to_num(0).abs().max() == 448
    assert seen_values.isnan().sum() == 1
    assert torch.equal(seen_keys, keys.to(FP8).float())
    gathered = cache.gather(2, torch.tensor([2, 0]))
    assert gathered[0].dtype == torch.float32
    assert torch.equal(gathered[0][[1, 0], [1, 1]], seen_keys)
    assert cache.layer(2)[0].dtype == FP8
    assert torch.equal(cache.layer(2)[0][0, 1].float(), seen_keys[0])
    assert not any(each.any() for each in cache.gather(1, torch.tensor([0, 1, 2])))
    cache.clear(torch.tensor([0, 2]))
    assert not any(each.any() for each in cache.gather(2, torch.tensor([0, 1, 2])))


def test_an_fp8_cache_holds_twice_the_tokens_of_float16() -> None:
    config = open_checkpoint(GUIDE).config
    budget = 40 * bytes_per_block(config, 8, torch.float16)
    num_blocks = [
        make_runner(GUIDE, dtype="float16", kv_cache_dtype=kv, kv_cache_bytes=budget).num_blocks
        for kv in ("auto", "fp8")
    ]
    assert num_blocks == [40, 80]
    assert num_blocks_for(budget, config, 8, FP8) == 80


def test_what_is_reported_names_what_is_in_eight_bits() -> None:
    formats = {
        EngineConfig(GUIDE, dtype="float16", quantization=q, kv_cache_dtype=kv).number_format
        for q in ("none", "fp8")
        for kv in ("auto", "fp8")
    }
    assert formats == {"float16", "float16+fp8", "float16+kv_fp8", "float16+fp8+kv_fp8"}


def test_every_format_has_a_name_a_meaning_and_a_setting() -> None:
    assert get_args(WeightFormat) == tuple(WEIGHT_FORMATS) == tuple(FORMATS)
    for name, meaning in WEIGHT_FORMATS.items():
        chosen = EngineSettings(model=GUIDE, quantization=name)
        assert chosen.engine_config().quantization == name
        assert meaning in (EngineSettings.model_fields["quantization"].description or "")
