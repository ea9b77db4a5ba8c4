"""The model runner: `Batch` in, one result per row out.

Owns the model, the KV cache tensor and the attention backend; knows no requests, no queue and no
block ownership. Not thread-safe: one thread calls it.
"""

from __future__ import annotations

import time

import torch

from nanoinfer_engine.attention import make_backend
from nanoinfer_engine.batch import Batch, BatchRow, RowResult
from nanoinfer_engine.checkpoints import open_checkpoint
from nanoinfer_engine.config import EngineConfig, ModelConfig
from nanoinfer_engine.inputs import build_inputs
from nanoinfer_engine.kv_cache import KVCache, num_blocks_for
from nanoinfer_engine.logprobs import score_prompts
from nanoinfer_engine.models import build_model, checkpoint_layout
from nanoinfer_engine.request import SamplingOptions
from nanoinfer_engine.sampler import sample
from nanoinfer_engine.weights import Progress, load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION_BACKEND = "reference"


def report_nothing(loaded: int, total: int) -> None:
    """The progress callback of a caller that does not watch."""


class ModelRunner:
    """Runs one model on one device."""

    def __init__(self, config: EngineConfig, progress: Progress = report_nothing) -> None:
        """Load the weights and allocate the KV cache.

        Raises CheckpointError for a checkpoint that cannot be served and ValueError for a
        configuration that contradicts it or itself.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._config = config
        dtype, device = _dtype(config.dtype), torch.device(config.device)
        checkpoint = open_checkpoint(config.model_path)
        self.model_config: ModelConfig = checkpoint.config
        self.max_model_len: int = _max_model_len(config, checkpoint.config)
        self.block_size: int = config.block_size
        self.num_blocks: int = _num_blocks(config, checkpoint.config, dtype)
        self._model = build_model(checkpoint.config, self.max_model_len, dtype, device)
        self.num_parameters: int = sum(each.numel() for each in self._model.parameters())
        layout = checkpoint_layout(checkpoint.config)
        self.weights_fingerprint: str = load_weights(
            self._model, checkpoint, layout, device, progress
        )
        self._device = device
        self._cache = KVCache(checkpoint.config, self.num_blocks, config.block_size, dtype, device)
        self._backend = make_backend(
            ATTENTION_BACKEND, self._cache, checkpoint.config.sliding_windows
        )

    @property
    def vocab_size(self) -> int:
        """Ids the model accepts and produces: 0 … vocab_size - 1."""
        return self.model_config.vocab_size

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[RowResult]:
        """Compute every row's tokens, sample where asked; results in row order.

        A row that cannot be sampled yields its exception. An exception raised here concerns the
        whole batch: the contents of its blocks are then undefined.
        """
        inputs = build_inputs(batch, self.block_size, self._device)
        if len(inputs.new_blocks):
            self._cache.clear(inputs.new_blocks)
        plan = self._backend.plan(inputs.attention)
        hidden = self._model(inputs.token_ids, inputs.positions, self._backend, plan)
        results: list[RowResult] = [None] * len(batch.rows)
        sampling = [index for index, row in enumerate(batch.rows) if row.samples]
        if sampling:
            logits = self._model.logits(hidden.index_select(0, inputs.sampled_tokens))
            sampled = sample(logits, [batch.rows[index] for index in sampling])
            for index, result in zip(sampling, sampled, strict=True):
                results[index] = result
        if any(row.scored_token_ids for row in batch.rows):
            return score_prompts(batch.rows, hidden, results, self._model.logits)
        return results

    def warm_up(self) -> float:
        """Run the largest prefill and decode steps once on made-up tokens; seconds it took.

        For the time before serving: it overwrites blocks that nobody may own yet.
        """
        began = time.perf_counter()
        capacity = min(self.max_model_len, self.num_blocks * self.block_size)
        length = min(capacity - 1, self._config.max_batch_tokens)
        if length >= 1:
            self.execute(Batch((self._made_up_row(0, length),)))
        decoding = min(self._config.max_batch_requests, self.num_blocks)
        self.execute(Batch(tuple(self._made_up_row(block, 1) for block in range(decoding))))
        return time.perf_counter() - began

    def _made_up_row(self, first_block: int, length: int) -> BatchRow:
        num_blocks = -(-length // self.block_size)
        options = SamplingOptions(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, seed=0)
        blocks = tuple(range(first_block, first_block + num_blocks))
        return BatchRow((0,) * length, 0, blocks, samples=True, sampling=options)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _num_blocks(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    if config.block_size < 1:
        raise ValueError(f"block_size {config.block_size} is less than 1")
    return num_blocks_for(config.kv_cache_bytes, model, config.block_size, dtype)


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
