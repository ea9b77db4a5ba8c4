"""Device steps from scheduler to ids without a GPU: kernels interpreted, the rest of CUDA faked."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nanoinfer_engine.core.batch import Batch, Step
from nanoinfer_engine.core.capacity import Capacity
from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.pipeline import Pipeline
from nanoinfer_engine.core.request import Request, RequestTimes, SamplingOptions, StoppingOptions
from nanoinfer_engine.core.scheduler import Scheduler
from nanoinfer_engine.ops.collectives import ALONE, Rank

from tests.engine.tiny_checkpoints import VOCAB_SIZE, make_checkpoint
from tests.gpu import fake_cuda
from tests.gpu.test_cuda_ops import BLOCK_SIZE, GREEDY, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="in Triton's interpreter alone"
    ),
]

MAX_ROWS, MAX_TOKENS, MAX_MODEL_LEN, NUM_BLOCKS = 4, 40, 64, 8
CONFIG = EngineConfig(
    Path("model"),
    max_batch_tokens=MAX_TOKENS,
    max_batch_requests=MAX_ROWS,
    block_size=BLOCK_SIZE,
)
NUM_TOKENS = 3
DRAWN = SamplingOptions(0.9, 30, 0.95, 0.0, 5)
COUNTED = SamplingOptions(0.0, 0, 1.0, 0.0, 0, presence_penalty=1.5, num_logprobs=2)
SCORED = SamplingOptions(0.0, 0, 1.0, 0.0, 0, num_prompt_logprobs=1)


@dataclass
class Served:
    token_ids: list[list[int]]
    kinds: list[str] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)


def make_steps(
    path: Path, patch: pytest.MonkeyPatch, *, mixed_graphs: bool, rank: Rank = ALONE
) -> Any:
    from nanoinfer_engine.step import device_steps
    from nanoinfer_engine.step import mixed_graphs as sizes

    fake_cuda.install(patch)
    patch.setattr(device_steps, "padded_sizes", lambda _: [1, MAX_ROWS])
    patch.setattr(sizes, "_DECODE_ROWS", (0, 2))
    patch.setattr(sizes, "_LEAST_PROMPT", 16)
    patch.setattr(sizes, "_TOKENS", (20, 64))
    device = torch.device("cpu")
    with torch.inference_mode():
        made = make_model(path, device)
        steps = device_steps.DeviceSteps(
            made.model,
            made.ops,
            replace(CONFIG, mixed_graphs=mixed_graphs),
            MAX_MODEL_LEN,
            VOCAB_SIZE,
            device,
            rank,
        )
        steps.prepare()
    return steps


def serve(steps: Any, options: list[SamplingOptions]) -> Served:
    class Runner:
        runs_ahead = True

        @torch.inference_mode()
        def launch(self, batch: Batch) -> Step:
            return steps.launch(batch)  # type: ignore[no-any-return]

    scheduler = Scheduler(CONFIG, Capacity(MAX_MODEL_LEN, NUM_BLOCKS * BLOCK_SIZE))
    pipeline = Pipeline(Runner())  # type: ignore[arg-type]
    source = random.Random(3)
    stopping = StoppingOptions(NUM_TOKENS, 0, frozenset(), frozenset(), False)
    requests = [
        Request(str(index), 0, tuple(source.choices(range(VOCAB_SIZE), k=length)), each, stopping,
                RequestTimes(0))
        for index, (length, each) in enumerate(zip((12, 20, 9, 17), options, strict=True))
    ]  # fmt: skip
    served = Served([request.completion_token_ids for request in requests])
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work or pipeline.is_busy:
        step = pipeline.advance(scheduler.schedule())
        if step is not None:
            served.kinds.append(step.timing.kind)
            outputs = scheduler.update(step.batch, step.results, step.timing.kind)
            assert not any(output.error for output in outputs)
    served.sizes = [key for key in steps.graphs._captured.replayed if not isinstance(key, int)]
    return served


@pytest.mark.parametrize(
    "options",
    [[GREEDY, DRAWN, COUNTED, GREEDY], [SCORED, GREEDY, COUNTED, DRAWN]],
    ids=["drawn", "scored"],
)
def test_steps_with_prompts_as_graphs_give_the_same(
    options: list[SamplingOptions], device: torch.device, tmp_path: Path
) -> None:
    path = make_checkpoint("llama3", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        plain = serve(make_steps(path, patch, mixed_graphs=False), options)
    with pytest.MonkeyPatch.context() as patch:
        padded = serve(make_steps(path, patch, mixed_graphs=True), options)
    assert all(len(each) == NUM_TOKENS for each in plain.token_ids)
    assert padded.token_ids == plain.token_ids
    assert plain.kinds.count("eager") == 2
    assert not plain.sizes
    # a prompt that is scored is not captured
    assert padded.kinds.count("eager") == (SCORED in options)
    assert len(padded.sizes) == 2 - (SCORED in options)


def test_one_of_several_ranks_captures_decodes_alone(device: torch.device, tmp_path: Path) -> None:
    path = make_checkpoint("llama3", tmp_path)
    for rank, captures in ((ALONE, True), (Rank(0, 2), False)):
        with pytest.MonkeyPatch.context() as patch:
            steps = make_steps(path, patch, mixed_graphs=True, rank=rank)
        assert bool(steps.mixed_graphs.sizes) == captures
        assert steps.graphs.sizes == (1, MAX_ROWS)
