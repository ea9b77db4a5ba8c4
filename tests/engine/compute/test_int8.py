"""INT8 weights: how far from full precision, how loaded, and served by an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nanoinfer.v1 import generation_pb2 as pb
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.models import build_model, checkpoint_layout
from nanoinfer_engine.ops.linear import FullLinear
from nanoinfer_engine.ops.linear.int8 import Int8Linear
from nanoinfer_engine.step.runner import ModelRunner
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from nanoinfer_engine.weights.loading import load_weights
from torch import Tensor, nn

from tests.engine.compute.driver import GREEDY, AllLogits, Job, make_runner, run
from tests.engine.compute.test_quantization import GUIDE, facts, relative_error
from tests.engine.control.conftest import start_engine
from tests.engine.tiny_checkpoints import make_checkpoint

CPU = torch.device("cpu")


def quantized(source: nn.Linear | FullLinear, cut: int = 7) -> Int8Linear:
    """The same layer in 8 bits, loaded in two pieces."""
    outputs, inputs = source.weight.shape
    module = Int8Linear(inputs, outputs, source.weight.dtype, bias=source.bias is not None)
    module.allocate(CPU)
    for first, stop in ((0, cut), (cut, outputs)):
        module.load_rows(first, source.weight[first:stop], lambda stored, to: to.copy_(stored))
    if source.bias is not None and module.bias is not None:
        module.bias.copy_(source.bias)
    return module


def normal(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    source = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    source.weight.normal_(0, inputs**-0.5)
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_close_to_the_full_one(dtype: torch.dtype, bias: bool) -> None:
    source = normal(512, 2061, bias)  # more rows than are restored at once, and an odd number
    x = torch.randn(20, 512)
    expected = source(x)
    output = quantized(source.to(dtype))(x.to(dtype))
    assert (output.dtype, output.shape) == (dtype, (20, 2061))
    assert 1e-3 < relative_error(output, expected) < 1e-2


def test_a_token_gives_the_same_alone_and_beside_outliers() -> None:
    source, x = normal(256, 1100), torch.randn(40, 256)
    x[5] *= 1e4
    module = quantized(source)
    together = module(x)
    for row in range(40):
        assert relative_error(module(x[row : row + 1])[0], together[row]) < 1e-6
    assert relative_error(together[6:], source(x)[6:]) < 1e-2


def test_a_large_output_costs_no_other_precision() -> None:
    source = normal(256, 64)
    plain = quantized(source)
    source.weight[3] *= 1e4
    outlier = quantized(source, cut=3)
    assert torch.equal(outlier.weight, plain.weight)
    kept = [row for row in range(64) if row != 3]
    assert torch.equal(outlier.scale[kept], plain.scale[kept])
    assert float(outlier.scale[3] / plain.scale[3]) == pytest.approx(1e4)


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    source = normal(32, 16)
    source.weight[0] = 0
    source.weight[1, 2], source.weight[2, 3] = float("nan"), float("-inf")
    output = quantized(source)(torch.ones(2, 32))
    assert not output[:, 0].any()
    assert output[:, 1:3].isnan().all()
    assert output[:, 3:].isfinite().all()


def test_a_product_does_not_overflow_float16() -> None:
    """127 times the inputs' sum would."""
    source = normal(512, 8)
    source.weight.fill_(0.01)
    x = torch.full((1, 512), 10.0, dtype=torch.float16)
    output = quantized(source.half())(x)
    assert relative_error(output, torch.full((1, 8), 51.2)) < 2e-3


@pytest.mark.parametrize("kind", ["llama3", "phi3", "gpt2"])
def test_the_layers_linears_are_quantised_as_they_are_loaded(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(kind, tmp_path))
    config, sizes = checkpoint.config, list[int]()
    models = []
    for linear in (FullLinear, Int8Linear):
        model = build_model(config, 16, torch.float32, CPU, linear)
        layout = checkpoint_layout(config)

        def progress(_: object, model: nn.Module = model) -> None:
            sizes.append(sum(p.nbytes for p in model.parameters() if not p.is_meta))

        load_weights(model, checkpoint, layout, CPU, progress)
        models.append(model)
    full, eight = models
    modules = {n: m for n, m in eight.named_modules() if isinstance(m, Int8Linear)}
    assert len(modules) == 4 * config.num_layers
    for name, module in modules.items():
        restored = module.weight * module.scale[:, None]
        assert relative_error(restored, full.get_parameter(f"{name}.weight")) < 1e-2, name
    assert torch.equal(eight.embedding.weight, full.embedding.weight)
    assert max(sizes[len(sizes) // 2 :]) == sum(p.nbytes for p in eight.parameters())


def guide_logits(scheme: str) -> Tensor:
    model = AllLogits(GUIDE, quantization=scheme)
    rows = [BatchRow(tuple(ids), 0, tuple(range(50)), True, GREEDY) for ids in facts(6)]
    return torch.cat([model.step([row])[0] for row in rows])


def test_a_trained_model_says_the_same() -> None:
    expected, actual = guide_logits("none"), guide_logits("int8")
    assert 1e-4 < relative_error(actual, expected) < 3e-2
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > 0.98
    ids = facts(1)[0][:6]
    alone, jobs = Job(ids, 20), [Job(ids, 20), Job(ids, 20, chunk=3, starts_at=2)]
    run(make_runner(GUIDE), [alone])
    run(make_runner(GUIDE, quantization="int8"), jobs)
    assert [job.tokens for job in jobs] == [alone.tokens, alone.tokens]


async def test_an_engine_serves_them() -> None:
    prompt = facts(1)[0][:6]
    job = Job(prompt, 12)
    run(make_runner(GUIDE, quantization="int8"), [job])
    async with start_engine(
        ModelRunner, model=GUIDE, quantization="int8", kv_cache_memory="4MiB"
    ) as engine:
        answer = await engine.generate(
            prompt,
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StoppingParams(max_tokens=12, ignore_eos=True),
        )
        assert answer.tokens() == job.tokens[len(prompt) :]
