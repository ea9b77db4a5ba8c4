"""Several ranks against one process: weights and fingerprint, logits, tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nanoinfer_engine.core.batch import Batch, BatchRow
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.progress import report_nothing
from nanoinfer_engine.core.request import SampledToken, SamplingOptions
from nanoinfer_engine.models import build_model, checkpoint_layout
from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.parallel.ranks import ParallelRunner
from nanoinfer_engine.step.runner import ModelRunner
from nanoinfer_engine.weights.checkpoints import Part, open_checkpoint
from nanoinfer_engine.weights.loading import load_weights
from nanoinfer_engine.weights.sharding import local_config, take_share

from tests.engine.compute.driver import GREEDY, generate
from tests.engine.rank_processes import run_ranks
from tests.engine.tiny_checkpoints import KINDS, VOCAB_SIZE, make_checkpoint

GUIDE = Path(__file__).resolve().parents[3] / "models" / "guide"
TIE = 1e-4
CPU = torch.device("cpu")
SHARED = [kind for kind in KINDS if kind not in ("gpt2", "smollm2")]
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_checkpoint(kind, root / kind) for kind in KINDS}


def loaded(path: Path, rank: Rank) -> tuple[dict[str, torch.Tensor], str]:
    """Parameters by name, and the fingerprint."""
    checkpoint = open_checkpoint(path)
    share = take_share(checkpoint, rank, 8, torch.float32, CPU)
    layout = checkpoint_layout(checkpoint.config)
    fingerprint = load_weights(
        share.model, checkpoint, layout, CPU, report_nothing, placements=share.placements
    )
    assert share.num_parameters == sum(
        each.numel() for each in build_model(checkpoint.config, 8, torch.float32, CPU).parameters()
    )
    return dict(share.model.named_parameters()), fingerprint


@pytest.mark.parametrize("kind", SHARED)
def test_the_shares_are_the_whole(kind: str, checkpoints: dict[str, Path]) -> None:
    """Each weight is in one share, at its place; one device's fingerprint is the first rank's."""
    whole, fingerprint = loaded(checkpoints[kind], ALONE)
    shares, fingerprints = zip(
        *(loaded(checkpoints[kind], Rank(i, 2)) for i in range(2)), strict=True
    )
    assert fingerprints[0] == fingerprint
    config = open_checkpoint(checkpoints[kind]).config
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"qkv": (heads, keys, keys), "up": (config.intermediate_size,) * 2}
    for name, expected in whole.items():
        parts = [share[name] for share in shares]
        module, kind_of = name.split(".")[-2:]
        if module in sizes:
            halves = [part.split([size // 2 for size in sizes[module]]) for part in parts]
            actual = torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)])
        elif module in ("output", "down"):
            actual = torch.cat(parts, 1) if kind_of == "weight" else parts[0] + parts[1]
        elif module in ("embedding", "head"):
            actual = torch.cat(parts)
        else:
            assert torch.equal(*parts)
            actual = parts[0]
        assert torch.equal(actual, expected), name
    numel = [sum(each.numel() for each in share.values()) for share in (whole, *shares)]
    norms = sum(each.numel() for name, each in whole.items() if each.ndim == 1)
    assert numel[1] == numel[2]
    assert numel[0] <= 2 * numel[1] <= numel[0] + norms


def test_a_part_is_what_slicing_the_whole_gives(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(checkpoints["phi3"])
    name = "model.layers.1.self_attn.qkv_proj.weight"
    whole = checkpoint.read(name)
    assert torch.equal(checkpoint.read(name, Part(0, 5, 9)), whole[5:9])
    assert torch.equal(checkpoint.read(name, Part(1, 5, 9)), whole[:, 5:9])


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("gpt2", 2, r"tensor_parallel is 2, but gpt2 runs on one device"),
        ("smollm2", 2, r"num_attention_heads 3 is not a multiple of tensor_parallel 2"),
        ("qwen3", 4, r"num_key_value_heads 2 is not a multiple of tensor_parallel 4"),
    ],
)
def test_what_cannot_be_shared_is_named(
    kind: str, size: int, message: str, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        take_share(open_checkpoint(checkpoints[kind]), Rank(0, size), 8, torch.float32, CPU)


def test_other_sizes_that_cannot_be_shared(checkpoints: dict[str, Path]) -> None:
    config = open_checkpoint(checkpoints["qwen3"]).config
    with pytest.raises(ValueError, match="intermediate_size 97"):
        local_config(replace(config, intermediate_size=97), 2)
    many = replace(config, num_heads=12, num_kv_heads=12, vocab_size=5)
    with pytest.raises(ValueError, match="vocab_size 5 is too small"):
        local_config(replace(many, intermediate_size=96), 4)
    assert local_config(replace(config, vocab_size=257), 2).vocab_size == 129


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "needs device cpu or cuda, not cuda:1"), ("cuda", "CUDA devices here are")],
)
def test_devices_that_are_not_there(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelRunner(EngineConfig(GUIDE, device=device, tensor_parallel=99))


def logits_of(
    config: EngineConfig, rank: Rank, paths: Sequence[Path]
) -> list[tuple[torch.Tensor, list[object]]]:
    """Per model: the logits of a mixed step, a chunk and decodes, and what was sampled there."""
    source, answers = random.Random(5), []
    for path in paths:
        prompts = [tuple(source.randrange(VOCAB_SIZE) for _ in range(n)) for n in (40, 21, 1)]
        runner = ModelRunner(replace(config, model_path=path), rank=rank)
        original, seen, results = runner._logits, [], []

        def spy(hidden: torch.Tensor, original=original, seen=seen) -> torch.Tensor:  # type: ignore[no-untyped-def]
            seen.append(original(hidden))
            return seen[-1]

        runner._logits = spy  # type: ignore[method-assign]
        sampling = SamplingOptions(0.9, 0, 0.95, 0.0, 3)
        blocks = [tuple(range(first, first + 8)) for first in (0, 8, 16)]
        steps: list[list[tuple[int, int, int]]] = [[(0, 0, 9), (1, 0, 21), (2, 0, 1)]]
        steps += [[(0, 9, 40)], [(1, 10, 11), (0, 39, 40)]]
        for step in steps:
            rows = [
                BatchRow(prompts[i][a:b], a, blocks[i][: -(-b // 8)], True, sampling)
                for i, a, b in step
            ]
            results += runner.launch(Batch(tuple(rows))).results()
        answers.append((torch.cat(seen).clone(), results))
    return answers


def assert_same_logits(paths: Sequence[Path], size: int) -> None:
    config = EngineConfig(GUIDE, block_size=8, kv_cache_bytes=1 << 20, num_threads=1)
    ranks = run_ranks(logits_of, config, paths, size=size)
    for path, alone, *each in zip(paths, logits_of(config, ALONE, paths), *ranks, strict=True):
        for logits, sampled in each:
            assert torch.equal(logits, each[0][0]), path
            assert sampled == alone[1], path
            assert logits.shape == alone[0].shape
            assert (logits - alone[0]).abs().max() <= 1e-5 * alone[0].abs().max(), path
        assert alone[0].std() > 0.1


@pytest.mark.slow
def test_every_architecture_gives_the_same_logits(checkpoints: dict[str, Path]) -> None:
    assert_same_logits([checkpoints[kind] for kind in SHARED], 2)


@pytest.mark.slow
def test_three_ranks_and_a_vocabulary_that_does_not_divide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine import tiny_checkpoints

    paths = []
    for name, tied in (("tied", True), ("untied", False)):
        build = tiny_checkpoints._make("Qwen2", tie_word_embeddings=tied, **SIX_HEADS)
        monkeypatch.setitem(KINDS, name, build)
        paths.append(make_checkpoint(name, tmp_path / name))
    assert_same_logits(paths, 3)


@pytest.fixture(scope="module")
def pair() -> Iterator[ParallelRunner]:
    config = EngineConfig(GUIDE, kv_cache_bytes=8 << 20, num_threads=1, tensor_parallel=2)
    runner = ParallelRunner(config)
    assert runner.warm_up() > 0
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def alone() -> ModelRunner:
    return ModelRunner(EngineConfig(GUIDE, kv_cache_bytes=16 << 20, num_threads=1))


def texts(count: int, longest: int = 60) -> list[tuple[int, ...]]:
    source = random.Random(count)
    lengths = [source.randint(2, longest) for _ in range(count)]
    return [tuple(source.randrange(8000) for _ in range(length)) for length in lengths]


def assert_same(
    actual: list[list[SampledToken]],
    expected: list[list[SampledToken]],
    prompts: Sequence[tuple[int, ...]],
    one: ModelRunner,
) -> None:
    """Equal but where the two best logits are as good as tied."""
    for prompt, ours, theirs in zip(prompts, actual, expected, strict=True):
        pairs = [(a.token_id, b.token_id) for a, b in zip(ours, theirs, strict=True)]
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is not None:
            tokens = (*prompt, *(b for _, b in pairs[:place]))
            options = replace(GREEDY, num_logprobs=2)
            blocks = tuple(range(-(-len(tokens) // one.block_size)))
            (result,) = one.launch(Batch((BatchRow(tokens, 0, blocks, True, options),))).results()
            assert isinstance(result, tuple)
            first, second = result[0].top
            assert first.logprob - second.logprob < TIE


def test_two_processes_give_the_tokens_of_one(pair: ParallelRunner, alone: ModelRunner) -> None:
    assert pair.weights_fingerprint == alone.weights_fingerprint
    assert (pair.num_parameters, pair.model_config) == (alone.num_parameters, alone.model_config)
    assert (pair.num_blocks, pair.vocab_size) == (alone.num_blocks, alone.vocab_size)
    bytes_of = [
        sum(each.nbytes for each in runner._model.parameters()) for runner in (pair._runner, alone)
    ]
    assert 0.5 <= bytes_of[0] / bytes_of[1] < 0.51
    prompts = texts(6)
    assert_same(generate(pair, prompts, 16), generate(alone, prompts, 16), prompts, alone)


def test_prefixes_chunks_and_preemption(pair: ParallelRunner, alone: ModelRunner) -> None:
    shared = tuple(range(100, 150))
    prompts = [shared + text for text in texts(5, 20)]
    expected = generate(alone, prompts, 40)
    again = generate(pair, prompts * 2, 40, max_batch_tokens=32, kv_tokens=320)
    assert_same(again, expected * 2, prompts * 2, alone)


def test_sampled_tokens_and_log_probabilities(pair: ParallelRunner, alone: ModelRunner) -> None:
    prompts = texts(4)
    options = SamplingOptions(0.8, 40, 0.95, 0.01, 7, num_logprobs=2, frequency_penalty=0.3)
    actual, expected = (generate(each, prompts, 10, options) for each in (pair, alone))
    for ours, theirs in zip(actual, expected, strict=True):
        assert [each.token_id for each in ours] == [each.token_id for each in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a.logprob is not None
            assert b.logprob is not None
            assert a.logprob.logprob == pytest.approx(b.logprob.logprob, abs=1e-4)
