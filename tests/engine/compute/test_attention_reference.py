"""The reference backend against dense attention written out per token; cache and inputs."""

from __future__ import annotations

import random

import pytest
import torch
from nanoinfer_engine.core.batch import Batch, BatchRow
from nanoinfer_engine.core.config import ModelConfig, RopeConfig
from nanoinfer_engine.ops.attention import ReferenceAttention
from nanoinfer_engine.ops.kv_cache import KVCache, bytes_per_block, num_blocks_for
from nanoinfer_engine.step.inputs import build_inputs

from tests.engine.compute.driver import GREEDY

CPU = torch.device("cpu")


def config(heads: int, kv_heads: int, window: int | None) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        topology="decoder",
        vocab_size=32,
        hidden_size=heads * 16,
        intermediate_size=32,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=512,
        norm_eps=1e-5,
        activation="silu",
        tie_word_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        norm_bias=False,
        qk_norm=False,
        sliding_windows=(window, None),
        rope=RopeConfig(),
    )


def dense(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """One row, float64, token by token: query [n, heads, d] at positions start …"""
    out = torch.empty_like(query, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for i in range(len(query)):
        stop = start + i + 1
        first = max(stop - window, 0) if window else 0
        for head in range(query.shape[1]):
            k = keys[first:stop, head // group].double()
            scores = k @ query[i, head].double() * scale
            if softcap is not None:
                scores = (scores / softcap).tanh() * softcap
            out[i, head] = scores.softmax(0) @ values[first:stop, head // group].double()
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.4, 1.5)])
def test_steps_of_mixed_rows(
    heads: int, kv_heads: int, window: int | None, scale: float | None, softcap: float | None
) -> None:
    model = config(heads, kv_heads, window)
    cache = KVCache(model, 128, 4, torch.float32, CPU)
    backend = ReferenceAttention(cache, model.sliding_windows)
    source = random.Random(heads * 100 + (window or 0))
    generator = torch.Generator().manual_seed(1)
    lengths = [60, 33, 5, 1, 18, 90]
    deal = list(range(128))
    source.shuffle(deal)
    blocks = [[deal.pop() for _ in range(-(-length // 4))] for length in lengths]
    stored = [torch.randn(3, n, heads, 16, generator=generator) for n in lengths]
    done = [0] * len(lengths)
    while done != lengths:
        live = [i for i in range(len(lengths)) if done[i] < lengths[i]]
        source.shuffle(live)
        stops = {i: min(done[i] + source.choice((1, 1, 1, 2, 6, 13)), lengths[i]) for i in live}
        rows = tuple(
            BatchRow(
                (0,) * (stops[i] - done[i]),
                done[i],
                tuple(blocks[i][: -(-stops[i] // 4)]),
                False,
                GREEDY,
            )
            for i in live
        )
        inputs = build_inputs(Batch(rows), 4, CPU)
        cache.clear(inputs.new_blocks)
        plan = backend.plan(inputs.attention)
        q, k, v = (torch.cat([stored[i][j, done[i] : stops[i]] for i in live]) for j in range(3))
        for layer in (0, 1):
            kv = k[:, :kv_heads], v[:, :kv_heads]
            output = backend.forward(layer, q, *kv, plan, scale, softcap)
            for i, actual in zip(live, output.split([r.num_tokens for r in rows]), strict=True):
                query, keys, values = stored[i]
                expected = dense(
                    query[done[i] : stops[i]],
                    keys[:, :kv_heads],
                    values[:, :kv_heads],
                    done[i],
                    model.sliding_windows[layer],
                    scale or 0.25,
                    softcap,
                )
                assert (actual - expected).abs().max().item() < 1e-5
        for i in live:
            done[i] = stops[i]


def test_a_row_is_untouched_by_not_a_number_in_anothers_blocks_and_in_reused_ones() -> None:
    model = config(2, 1, None)
    cache = KVCache(model, 4, 4, torch.float32, CPU)
    backend = ReferenceAttention(cache, model.sliding_windows)
    rows = (
        BatchRow((0,) * 3, 0, (1,), False, GREEDY),
        BatchRow((0,) * 7, 0, (0, 2), False, GREEDY),
    )

    def step(rows: tuple[BatchRow, ...], values: torch.Tensor) -> torch.Tensor:
        inputs = build_inputs(Batch(rows), 4, CPU)
        cache.clear(inputs.new_blocks)
        plan = backend.plan(inputs.attention)
        return backend.forward(0, values.expand(-1, 2, -1), values, values, plan)

    poison = torch.full((10, 1, 16), float("nan"))
    assert step(rows, poison).isnan().all()
    # the first row's block is given to a new owner; the second still holds NaN next to it
    fresh = torch.randn(10, 1, 16)
    fresh[3:] = float("nan")
    step(rows, fresh)
    decode = (
        BatchRow((0,), 3, (1,), False, GREEDY),
        BatchRow((0,), 7, (0, 2), False, GREEDY),
    )
    output = step(decode, torch.randn(2, 1, 16))
    assert output[0].isfinite().all()
    assert output[1].isnan().all()


def test_inputs_lay_rows_end_to_end() -> None:
    rows = (
        BatchRow((7, 8, 9), 3, (5, 2), True, GREEDY),
        BatchRow((4,), 8, (1, 0, 6), False, GREEDY),
        BatchRow((3,), 2, (9,), True, GREEDY),
    )
    inputs = build_inputs(Batch(rows), 4, CPU)
    assert inputs.token_ids.tolist() == [7, 8, 9, 4, 3]
    assert inputs.positions.tolist() == [3, 4, 5, 8, 2]
    assert inputs.sampled_tokens.tolist() == [2, 4]
    assert inputs.new_blocks.tolist() == [2, 6]
    attention = inputs.attention
    assert attention.slots.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 6 * 4, 9 * 4 + 2]
    assert attention.query_starts.tolist() == [0, 3, 4, 5]
    assert attention.context_lengths.tolist() == [6, 9, 3]
    assert attention.block_tables.tolist() == [[5, 2, 2], [1, 0, 6], [9, 9, 9]]


def test_blocks_fit_the_budget() -> None:
    model = config(4, 2, None)
    one = bytes_per_block(model, 16, torch.float32)
    assert one == 2 * 2 * 16 * 2 * 16 * 4
    assert bytes_per_block(model, 16, torch.float16) * 2 == one
    assert num_blocks_for(10 * one + 1, model, 16, torch.float32) == 10
    with pytest.raises(ValueError, match="kv_cache_bytes"):
        num_blocks_for(one - 1, model, 16, torch.float32)
    cache = KVCache(model, 10, 16, torch.float32, CPU)
    keys, values = cache.gather(0, torch.arange(10))
    assert 2 * (keys.nbytes + values.nbytes) == 10 * one
