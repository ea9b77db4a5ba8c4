"""A hand loop over ModelRunner: no scheduler, blocks dealt out once, shuffled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from nanoinfer_engine.core.batch import Batch, BatchRow, Runner
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.progress import report_nothing
from nanoinfer_engine.core.request import (
    Request,
    RequestTimes,
    SampledToken,
    SamplingOptions,
    StoppingOptions,
    prompt_key,
)
from nanoinfer_engine.core.scheduler import Scheduler
from nanoinfer_engine.models import build_model, checkpoint_layout
from nanoinfer_engine.ops.attention import ReferenceAttention
from nanoinfer_engine.ops.kv_cache import KVCache, stored_dtype
from nanoinfer_engine.ops.linear import linear_format
from nanoinfer_engine.ops.reference import ReferenceOps, ReferenceStep
from nanoinfer_engine.step.inputs import build_inputs
from nanoinfer_engine.step.runner import ModelRunner
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from nanoinfer_engine.weights.loading import load_weights

GREEDY = SamplingOptions(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)


def make_runner(path: Path, **overrides: object) -> ModelRunner:
    settings = {"block_size": 8, "kv_cache_bytes": 4 << 20, "max_batch_tokens": 64}
    return ModelRunner(EngineConfig(model_path=path, **(settings | overrides)))  # type: ignore[arg-type]


class AllLogits:
    """The model of a checkpoint with every token's logits exposed, as the runner computes them."""

    def __init__(
        self,
        path: Path,
        block_size: int = 8,
        num_blocks: int = 128,
        quantization: str = "none",
        kv_cache_dtype: str = "auto",
    ) -> None:
        device = torch.device("cpu")
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        positions, linear = config.max_position_embeddings, linear_format(quantization)
        self.model = build_model(config, positions, torch.float32, device, linear)
        load_weights(self.model, checkpoint, checkpoint_layout(config), device, report_nothing)
        stored = stored_dtype(kv_cache_dtype, torch.float32)
        cache = KVCache(config, num_blocks, block_size, torch.float32, device, stored)
        self.attention = ReferenceAttention(cache, config.sliding_windows)
        self.ops = ReferenceOps(self.attention)
        self.block_size, self.num_blocks = block_size, num_blocks

    def step(self, rows: Sequence[BatchRow]) -> list[torch.Tensor]:
        """Logits [tokens, vocabulary] per row."""
        return list(self.logits_of(rows).split([row.num_tokens for row in rows]))

    @torch.inference_mode()
    def logits_of(
        self, rows: Sequence[BatchRow], kept: Sequence[int] | None = None
    ) -> torch.Tensor:
        """[tokens, vocabulary] of all rows' tokens end to end, or of the `kept` ones alone."""
        inputs = build_inputs(Batch(tuple(rows)), self.block_size, torch.device("cpu"))
        plan = self.attention.plan(inputs.attention)
        step = ReferenceStep(inputs.token_ids, inputs.positions, plan)
        wanted = None if kept is None else torch.tensor(kept, dtype=torch.int64)
        return self.model.logits(self.ops, self.model(self.ops, step, wanted))


@dataclass
class Job:
    """One prompt on its way through the hand loop; `chunk` is its prefill chunk size."""

    prompt: list[int]
    num_tokens: int
    chunk: int = 1000
    sampling: SamplingOptions = GREEDY
    starts_at: int = 0
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    output: list[SampledToken] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + [token.token_id for token in self.output]

    def row(self, block_size: int) -> BatchRow:
        stop = min(self.computed + self.chunk, len(self.tokens))
        return BatchRow(
            tuple(self.tokens[self.computed : stop]),
            self.computed,
            tuple(self.blocks[: -(-stop // block_size)]),
            samples=stop == len(self.tokens),
            sampling=self.sampling,
            prompt_key=prompt_key(self.prompt),
        )


def run(runner: ModelRunner, jobs: Sequence[Job], seed: int = 0) -> None:
    """Run all jobs to their end in shared batches."""
    deal = list(range(runner.num_blocks))
    random.Random(seed).shuffle(deal)
    for job in jobs:
        needed = -(-(len(job.prompt) + job.num_tokens) // runner.block_size)
        job.blocks = [deal.pop() for _ in range(needed)]
    step = 0
    while any(len(job.output) < job.num_tokens for job in jobs):
        live = [j for j in jobs if j.starts_at <= step and len(j.output) < j.num_tokens]
        step += 1
        if not live:
            continue
        rows = [job.row(runner.block_size) for job in live]
        results = runner.launch(Batch(tuple(rows))).results()
        for job, row, result in zip(live, rows, results, strict=True):
            job.computed = row.context_length
            if row.samples:
                assert isinstance(result, tuple), result
                job.output += result
            else:
                assert result == ()


def generate(
    runner: Runner,
    prompts: Sequence[tuple[int, ...]],
    num_tokens: int,
    sampling: SamplingOptions = GREEDY,
    kv_tokens: int | None = None,
    **changes: object,
) -> list[list[SampledToken]]:
    """All prompts at once through scheduler and pipeline, to their ends."""
    config = EngineConfig(Path("unused"), block_size=runner.block_size, max_batch_requests=16)
    config = replace(config, **changes)  # type: ignore[arg-type]
    capacity = Capacity(runner.max_model_len, kv_tokens or runner.num_blocks * runner.block_size)
    scheduler, pipeline = Scheduler(config, capacity), Pipeline(runner)
    tokens: dict[str, list[SampledToken]] = {}
    for index, prompt in enumerate(prompts):
        stopping = StoppingOptions(num_tokens, 0, frozenset(), frozenset(), False)
        options = replace(sampling, seed=sampling.seed + index)
        times, key = RequestTimes(arrived=0), prompt_key(prompt)
        request = Request(str(index), 0, prompt, options, stopping, times, prompt_key=key)
        scheduler.add(request)
        tokens[request.request_id] = []
    while scheduler.has_work or pipeline.is_busy:
        step = pipeline.advance(scheduler.schedule())
        for output in scheduler.update(step.batch, step.results) if step else []:
            assert output.error is None, output.error
            tokens[output.request.request_id] += output.tokens
    if kv_tokens is not None:
        assert scheduler.num_preemptions > 0
    return list(tokens.values())
