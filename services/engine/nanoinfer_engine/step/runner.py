"""The model runner: `Batch` in, one result per row out.

Owns the model, the KV cache tensor and the attention backend; knows no requests, no queue and no
block ownership. Not thread-safe: one thread calls it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanoinfer_engine.core.batch import Batch, BatchRow, FinishedStep, RowResult, Step
from nanoinfer_engine.core.config import EngineConfig, ModelConfig
from nanoinfer_engine.core.progress import Progress, report_nothing
from nanoinfer_engine.core.request import SamplingOptions
from nanoinfer_engine.models import checkpoint_layout
from nanoinfer_engine.ops.attention import ReferenceAttention
from nanoinfer_engine.ops.collectives import ALONE, Rank
from nanoinfer_engine.ops.kv_cache import KVCache, num_blocks_for, stored_dtype
from nanoinfer_engine.ops.linear import linear_format
from nanoinfer_engine.ops.reference import ReferenceOps, ReferenceStep
from nanoinfer_engine.sampling.logprobs import score_prompts
from nanoinfer_engine.sampling.sampler import sample
from nanoinfer_engine.step.cpus import usable_cpus
from nanoinfer_engine.step.inputs import build_inputs
from nanoinfer_engine.weights.checkpoints import Checkpoint, open_checkpoint
from nanoinfer_engine.weights.loading import load_weights
from nanoinfer_engine.weights.number_formats import DTYPES, choose_dtype
from nanoinfer_engine.weights.sharding import take_share

if TYPE_CHECKING:
    from nanoinfer_engine.step.device_steps import DeviceSteps

_LOG = logging.getLogger(__name__)

_FP8_CAPABILITY = (8, 9)


def default_threads() -> int:
    """Threads of a step where no number is asked for: torch's own, within the usable CPUs."""
    return min(torch.get_num_threads(), usable_cpus())


class ModelRunner:
    """Runs one model on one device."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress = report_nothing,
        checkpoint: Checkpoint | None = None,
        rank: Rank = ALONE,
    ) -> None:
        """Load the weights (of `checkpoint`, where one is given) and allocate the KV cache.

        Of several ranks each loads its share of the model, and all must make the same calls.

        Raises CheckpointError for a checkpoint that cannot be served and ValueError for a
        configuration that contradicts it or itself.
        """
        torch.set_num_threads(config.num_threads or default_threads())
        _LOG.info("a step has %d threads", torch.get_num_threads())
        device = _device(config.device)
        check_fp8(config, device)
        checkpoint = checkpoint or open_checkpoint(config.model_path)
        name = choose_dtype(config.dtype, checkpoint, device)
        config = self._config = replace(config, dtype=name)
        self.number_format: str = config.number_format
        dtype = DTYPES[name]
        self._stored_dtype = stored_dtype(config.kv_cache_dtype, dtype)
        self.model_config: ModelConfig = checkpoint.config
        self.max_model_len: int = _max_model_len(config, checkpoint.config)
        self.block_size: int = config.block_size
        linear = linear_format(config.quantization)
        share = take_share(checkpoint, rank, self.max_model_len, dtype, device, linear)
        self._rank = rank
        self._model, self._share = share.model, share.config
        self.num_parameters: int = share.num_parameters
        layout = checkpoint_layout(checkpoint.config)
        self.weights_fingerprint: str = load_weights(
            self._model, checkpoint, layout, device, progress, share.placements
        )
        self._device, self._dtype = device, dtype
        self.num_blocks: int = rank.least(self._num_blocks())
        self._use(self._make_cache(self.num_blocks))

    def _num_blocks(self) -> int:
        """From the configuration, or from what the device has left."""
        config = self._config
        if config.block_size < 1:
            raise ValueError(f"block_size {config.block_size} is less than 1")
        if config.kv_cache_bytes is not None:
            return num_blocks_for(
                config.kv_cache_bytes, self._share, config.block_size, self._stored_dtype
            )
        if self._device.type != "cuda":
            raise ValueError("kv_cache_bytes is needed on a device other than CUDA")
        from nanoinfer_engine.step.device import fitting_blocks  # needs Triton

        def run_largest(cache: KVCache) -> None:
            self.num_blocks = cache.num_blocks
            self._use(cache)
            self._run_largest()
            self._use(self._make_cache(1))  # lets go of the trial's cache

        return fitting_blocks(config, self._share, self._make_cache, run_largest)

    def _make_cache(self, num_blocks: int) -> KVCache:
        size, stored = self.block_size, self._stored_dtype
        return KVCache(self._share, num_blocks, size, self._dtype, self._device, stored)

    def _use(self, cache: KVCache) -> None:
        """Attend over `cache` from now on."""
        self._cache = cache
        windows = self.model_config.sliding_windows
        self._attention = ReferenceAttention(cache, windows)
        self._ops = ReferenceOps(self._attention, self._rank, self.vocab_size)
        self._steps: DeviceSteps | None = None
        if self._device.type == "cuda":
            from nanoinfer_engine.step.device import open_device  # needs Triton

            self._steps = open_device(
                self._model,
                self._config,
                self._share,
                self.max_model_len,
                cache,
                self._rank,
                self.vocab_size,
            )

    @property
    def vocab_size(self) -> int:
        """Ids the model accepts and produces: 0 … vocab_size - 1."""
        return self.model_config.vocab_size

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` returns before the step has run."""
        return self._steps is not None

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Step:
        """Begin a step; where the device has no fused steps it is run to its end here.

        Its results are in row order; a row that cannot be sampled yields its exception. An
        exception raised here or by `results` concerns the whole batch: the contents of its blocks
        are then undefined.
        """
        if self._steps is None:
            return FinishedStep(self._run(batch))
        return self._steps.launch(batch)

    def _run(self, batch: Batch) -> list[RowResult]:
        """The plain path, on any device: the model as it is written, sampling on the host."""
        inputs = build_inputs(batch, self.block_size, self._device)
        if len(inputs.new_blocks):
            self._cache.clear(inputs.new_blocks)
        plan = self._attention.plan(inputs.attention)
        step = ReferenceStep(inputs.token_ids, inputs.positions, plan)
        wanted, scores = inputs.sampled_tokens, any(row.scored_token_ids for row in batch.rows)
        # where all tokens are wanted there is nothing to pick out
        kept = None if scores or len(wanted) == len(inputs.token_ids) else wanted
        hidden = self._model(self._ops, step, kept)
        results: list[RowResult] = [()] * len(batch.rows)
        sampling = [index for index, row in enumerate(batch.rows) if row.samples]
        if sampling:
            own = hidden if len(hidden) == len(wanted) else hidden.index_select(0, wanted)
            logits = self._logits(own)
            sampled = sample(logits, [batch.rows[index] for index in sampling])
            for index, result in zip(sampling, sampled, strict=True):
                results[index] = result if isinstance(result, Exception) else (result,)
        if scores:
            return score_prompts(batch.rows, hidden, results, self._logits)
        return results

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(self._ops, hidden)

    @torch.inference_mode()
    def warm_up(self) -> float:
        """Run the largest prefill and decode steps once on made-up tokens; seconds it took.

        On a CUDA device, choose kernels and capture graphs before.
        For the time before serving: it overwrites blocks that nobody may own yet.
        """
        began = time.perf_counter()
        if self._steps is not None:
            self._steps.prepare()
        self._run_largest()
        return time.perf_counter() - began

    def _run_largest(self) -> None:
        longest = min(self.max_model_len, self.num_blocks * self.block_size) - 1
        rows: list[BatchRow] = []
        num_tokens, first = self._config.max_batch_tokens, 0
        while num_tokens and len(rows) < self._config.max_batch_requests:
            length = min(longest, num_tokens)
            num_blocks = -(-length // self.block_size)
            if length < 1 or first + num_blocks > self.num_blocks:
                break
            rows.append(self._made_up_row(first, length))
            num_tokens, first = num_tokens - length, first + num_blocks
        if rows:
            self.launch(Batch(tuple(rows))).results()
        decoding = min(self._config.max_batch_requests, self.num_blocks)
        decodes = (self._made_up_row(block, 1) for block in range(decoding))
        self.launch(Batch(tuple(decodes))).results()

    def _made_up_row(self, first_block: int, length: int) -> BatchRow:
        num_blocks = -(-length // self.block_size)
        options = SamplingOptions(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, seed=0)
        blocks = tuple(range(first_block, first_block + num_blocks))
        return BatchRow((0,) * length, 0, blocks, samples=True, sampling=options)


def _device(name: str) -> torch.device:
    """The device, if it is here; ValueError says which is not."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it lacks
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton, streams and events go to the one that is current
    return device


def check_fp8(config: EngineConfig, device: torch.device) -> None:
    """ValueError where the configuration asks for FP8 of a CUDA device that does not know it."""
    if "fp8" not in (config.quantization, config.kv_cache_dtype) or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ValueError(
            f"fp8 needs compute capability {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]},"
            f" the device has {capability[0]}.{capability[1]}"
        )


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_model_len
    if wanted is None:
        return model.max_position_embeddings
    if not 1 <= wanted <= model.max_position_embeddings:
        raise ValueError(
            f"max_model_len {wanted} is not in 1 … {model.max_position_embeddings},"
            " what the model was made for"
        )
    return wanted
