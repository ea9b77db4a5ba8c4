"""The runner on the card against the CPU engine and transformers: logits, tokens, graphs."""

from __future__ import annotations

import importlib.util
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.core.batch import Batch, BatchRow, EndedStep
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.request import Request, RequestTimes, SamplingOptions, StoppingOptions
from nanoinfer_engine.core.scheduler import Scheduler
from nanoinfer_engine.step.runner import ModelRunner
from safetensors.torch import load_file, save_file

GUIDE = Path(__file__).resolve().parents[2] / "models" / "guide"
GREEDY = SamplingOptions(0.0, 0, 1.0, 0.0, 0)
TIE = 2e-2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_runner(device: str, dtype: str, **changes: object) -> ModelRunner:
    config = EngineConfig(
        model_path=GUIDE, device=device, dtype=dtype, max_batch_tokens=512, max_batch_requests=64
    )
    return ModelRunner(replace(config, **changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def card() -> ModelRunner:
    runner = make_runner("cuda", "float16")
    runner.warm_up()
    return runner


def prompts(count: int, seed: int, longest: int = 300) -> list[tuple[int, ...]]:
    source = random.Random(seed)
    lengths = [source.randint(1, longest) for _ in range(count)]
    return [tuple(source.randrange(8000) for _ in range(length)) for length in lengths]


def generate(
    runner: ModelRunner,
    texts: Sequence[tuple[int, ...]],
    num_tokens: int,
    sampling: SamplingOptions = GREEDY,
    kv_tokens: int | None = None,
    **changes: object,
) -> list[list[int]]:
    """The completions of all prompts, sent at once through scheduler and pipeline."""
    config = EngineConfig(model_path=GUIDE, max_batch_tokens=512, max_batch_requests=64)
    config = replace(config, **changes)  # type: ignore[arg-type]
    tokens = kv_tokens or runner.num_blocks * runner.block_size
    scheduler = Scheduler(config, Capacity(runner.max_model_len, tokens))
    pipeline = Pipeline(runner)
    requests = []
    for index, prompt in enumerate(texts):
        stopping = StoppingOptions(num_tokens, 0, frozenset(), frozenset(), False)
        options = replace(sampling, seed=sampling.seed + index)
        requests.append(Request(str(index), 0, prompt, options, stopping, RequestTimes(arrived=0)))
        scheduler.add(requests[-1])
    while scheduler.has_work or pipeline.is_busy:
        step = pipeline.advance(scheduler.schedule())
        if step is not None:
            for output in scheduler.update(step.batch, step.results):
                assert output.error is None, output.error
    assert scheduler.load.kv_usage == 0
    assert kv_tokens is None or scheduler.num_preemptions > 0
    return [list(request.completion_token_ids) for request in requests]


def assert_same(
    actual: list[list[int]], expected: list[list[int]], texts: Sequence[tuple[int, ...]]
) -> int:
    """Equal but where the two best logits are as good as tied; returns how many rows diverged."""
    reference = transformers_model()
    diverged = 0
    for prompt, ours, theirs in zip(texts, actual, expected, strict=True):
        if ours == theirs:
            continue
        place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *theirs[:place]]])).logits[0, -1]
        best = logits.topk(2).values
        assert float(best[0] - best[1]) < TIE, (place, best, ours[place], theirs[place])
        diverged += 1
    return diverged


def transformers_model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        GUIDE, dtype=torch.float32
    )
    return model.eval()


def eager_logits(runner: ModelRunner, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Of each step, as the model gives them; a replay would call nothing to be watched."""
    seen: list[torch.Tensor] = []
    steps = runner._steps
    assert steps is not None
    original = steps._model.logits

    def spy(*arguments: object, **keywords: object) -> torch.Tensor:
        seen.append(original(*arguments, **keywords))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps._model, "logits", spy)
        patch.setattr(steps.graphs, "can_replay", lambda _: False)
        patch.setattr(steps.mixed_graphs, "size", lambda *_: None)
        for batch in batches:
            runner.launch(batch).results()
    return [each.double().cpu() for each in seen]


def device_logits(runner: ModelRunner, prompt: tuple[int, ...]) -> torch.Tensor:
    """Of the prompt's last token."""
    blocks = tuple(range(-(-len(prompt) // runner.block_size)))
    (logits,) = eager_logits(runner, [Batch((BatchRow(prompt, 0, blocks, True, GREEDY),))])
    return logits[0]


def test_logits_against_transformers(card: ModelRunner) -> None:
    (prompt,) = prompts(1, 3)
    prompt = prompt[:200] if len(prompt) > 200 else prompt
    actual = device_logits(card, prompt)
    with torch.inference_mode():
        expected = transformers_model()(torch.tensor([prompt])).logits[0, -1].double()
    assert float((actual - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_a_gate_of_gelu_against_transformers(activation: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    torch.manual_seed(5)
    config = transformers.LlamaConfig(hidden_act=activation, **sizes, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(tmp_path)
    runner = make_runner("cuda", "float16", model_path=tmp_path, max_batch_requests=8)
    runner.warm_up()
    source = random.Random(2)
    for length in (1, 20, 150):  # a decode step (GEMV), few rows, and cuBLAS
        prompt = tuple(source.randrange(1000) for _ in range(length))
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0, -1].double()
        actual = device_logits(runner, prompt)
        assert float((actual - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("count", [1, 7, 40])
def test_greedy_tokens_equal_the_cpu_engines(card: ModelRunner, count: int) -> None:
    texts = prompts(count, count)
    cpu = make_runner("cpu", "float32")
    num_tokens = 48 if count < 20 else 12
    expected = generate(cpu, texts, num_tokens)
    diverged = assert_same(generate(card, texts, num_tokens), expected, texts)
    assert diverged <= max(count // 10, 1)


def test_graphs_equal_eager_at_the_same_padded_size(card: ModelRunner) -> None:
    texts = prompts(8, 11)
    with_graphs = generate(card, texts, 40)
    steps = card._steps
    assert steps is not None
    assert steps.graphs.can_replay(8)
    replay = steps.graphs.replay
    steps.graphs.replay = lambda n: steps.run_decode(steps.graphs.padded(n))
    try:
        eager = generate(card, texts, 40)
    finally:
        steps.graphs.replay = replay
    assert with_graphs == eager


def test_steps_say_what_the_device_did(card: ModelRunner) -> None:
    config = EngineConfig(model_path=GUIDE, max_batch_tokens=512, max_batch_requests=64)
    scheduler = Scheduler(config, Capacity(card.max_model_len, card.num_blocks * card.block_size))
    pipeline = Pipeline(card)
    stopping = StoppingOptions(50, 0, frozenset(), frozenset(), False)
    for index, prompt in enumerate(prompts(8, 21, longest=50)):
        scheduler.add(Request(str(index), 0, prompt, GREEDY, stopping, RequestTimes(arrived=0)))
    steps: list[EndedStep] = []
    began = time.perf_counter()
    while scheduler.has_work or pipeline.is_busy:
        step = pipeline.advance(scheduler.schedule())
        if step is not None:
            scheduler.update(step.batch, step.results, step.timing.kind)
            steps.append(step)
    seconds = time.perf_counter() - began
    kinds = [step.timing.kind for step in steps]
    assert kinds == ["graph"] * 50
    busy = sum(step.timing.busy for step in steps)
    idle = sum(step.timing.idle for step in steps)
    assert all(step.timing.busy > 0 for step in steps)
    assert all(step.timing.idle >= 0 for step in steps)
    assert steps[0].timing.idle == 0
    assert 0 <= idle / (busy + idle) < 1
    # device and host, each by its own clock, were no longer at it than the run lasted
    assert 0.5 * seconds < busy + idle < 1.05 * seconds
    assert 0 < sum(step.host for step in steps) < seconds


def test_chunked_prefill_beside_decoding(card: ModelRunner) -> None:
    texts = prompts(12, 5, longest=700)
    whole = generate(card, texts, 24, max_batch_tokens=8192)
    assert_same(generate(card, texts, 24, max_batch_tokens=64), whole, texts)


def test_prompts_that_begin_alike_share_blocks_within_a_step_and_after(card: ModelRunner) -> None:
    (common,) = prompts(1, 15)
    texts = [common + tail for tail in prompts(6, 16, longest=40)]
    apart = generate(card, texts, 20, prefix_caching=False)
    assert_same(generate(card, texts, 20), apart, texts)
    assert_same(generate(card, texts, 20, max_batch_requests=2), apart, texts)


def test_preemption_under_load(card: ModelRunner) -> None:
    texts = prompts(10, 6)
    free = generate(card, texts, 100)
    assert_same(generate(card, texts, 100, kv_tokens=1024), free, texts)


def test_sampling_with_a_seed_does_not_depend_on_the_batch(card: ModelRunner) -> None:
    texts = prompts(6, 8)
    options = SamplingOptions(0.8, 50, 0.95, 0.01, 77)
    together = generate(card, texts, 30, options)
    alone = [
        generate(card, [text], 30, replace(options, seed=77 + index))[0]
        for index, text in enumerate(texts)
    ]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    assert same >= 3  # another batch size is another rounding: a border may be crossed
    assert generate(card, texts, 30, options) == together


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
def test_bfloat16(card: ModelRunner) -> None:
    runner = make_runner("cuda", "bfloat16")
    runner.warm_up()
    texts = prompts(3, 12)
    first = [tokens[0] for tokens in generate(runner, texts, 20)]
    expected = [tokens[0] for tokens in generate(card, texts, 20)]
    assert sum(a == b for a, b in zip(first, expected, strict=True)) >= 2


def stored_as(dtype: torch.dtype, directory: Path) -> Path:
    """The shipped model with its weights in `dtype`; norms in float32, as some checkpoints are."""
    tensors = load_file(GUIDE / "model.safetensors")
    tensors = {n: t.to(dtype if t.ndim > 1 else torch.float32) for n, t in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    shutil.copy(GUIDE / "config.json", directory)
    return directory


@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        (torch.float32, "bfloat16"),
    ],
)
def test_the_dtype_follows_the_checkpoint(
    stored: torch.dtype, computed: str, tmp_path: Path
) -> None:
    runner = make_runner("cuda", "auto", model_path=stored_as(stored, tmp_path))
    assert runner.number_format == computed
    assert runner._cache.dtype == getattr(torch, computed)
    runner.warm_up()
    assert len(generate(runner, prompts(3, 1), 5)) == 3


def test_bfloat16_logits_graphs_and_seeds(tmp_path: Path) -> None:
    """Everything that float16 is tested for above, in the format that most checkpoints have."""
    runner = make_runner("cuda", "auto", model_path=stored_as(torch.bfloat16, tmp_path))
    runner.warm_up()
    (prompt,) = prompts(1, 3, longest=200)
    with torch.inference_mode():
        expected = transformers_model()(torch.tensor([prompt])).logits[0, -1].double()
    error = (device_logits(runner, prompt) - expected).norm() / expected.norm()
    assert float(error) < 4e-2
    texts = prompts(6, 8)
    options = SamplingOptions(0.8, 50, 0.95, 0.01, 77)
    assert generate(runner, texts, 30, options) == generate(runner, texts, 30, options)
    greedy = generate(runner, texts, 30)
    assert greedy == generate(runner, texts, 30)
    assert all(len(tokens) == 30 for tokens in greedy)


def test_a_checkpoint_beyond_float16s_range_is_finite(tmp_path: Path) -> None:
    """Activations of 10^6 between a gate and the linear behind it, as Qwen2 has them."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name:
                parameter.mul_(1e6)
            if "down_proj" in name:
                parameter.mul_(1e-6)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    prompt = tuple(range(5, 60))
    with torch.inference_mode():
        expected = model.float()(torch.tensor([prompt])).logits[0, -1].double()
    runner = make_runner("cuda", "auto", model_path=tmp_path)
    runner.warm_up()
    actual = device_logits(runner, prompt)
    assert float((actual - expected).norm() / expected.norm()) < 4e-2
    narrow = make_runner("cuda", "float16", model_path=tmp_path)
    narrow.warm_up()
    assert not device_logits(narrow, prompt).isfinite().all()


def test_the_cache_is_sized_from_free_memory() -> None:
    free, total = torch.cuda.mem_get_info()
    share = 1 - free / total + 0.2  # tests beside this one hold memory, too
    runner = make_runner("cuda", "float16", kv_cache_bytes=None, device_memory_share=share)
    per_token = 2 * 6 * 2 * 64 * 2
    held = runner.num_blocks * runner.block_size * per_token
    assert 0.1 * total < held < 0.25 * total
    assert len(generate(runner, prompts(3, 1), 5)) == 3
