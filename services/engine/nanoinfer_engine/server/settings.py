"""The engine's settings: what an operator can say, resolved into the core's `EngineConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.model_paths import model_name
from pydantic import ByteSize, Field, model_validator

from nanoinfer_engine.core.config import WEIGHT_FORMATS, EngineConfig, WeightFormat
from nanoinfer_engine.core.watchdog import Patience


class EngineSettings(ServiceSettings):
    """Flags, environment and file of `python -m nanoinfer_engine`; `--model` alone is required."""

    port: int = Field(50053, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(
        9093, ge=0, le=65535, description="Port of /metrics; 0 takes a free one, `none` is off."
    )
    trust_incoming_trace: bool = Field(
        True, description="Continue the caller's trace: inside a cluster the gateway is trusted."
    )
    model: Path = Field(description="Model directory, or a .pt checkpoint.")
    model_name: str | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="Name that requests give; unset: the directory's, or ORG/NAME of a snapshot in"
        " the Hugging Face cache.",
    )
    tokenizer: Path | None = Field(
        None, description="Tokenizer of a model that brings none; its fingerprint and EOS are used."
    )
    device: str = Field("cpu", description="Device to run on: `cpu`, or `cuda` with Triton.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number format of the computation. On CUDA `auto` is the checkpoint's own:"
        " float16 or bfloat16, and bfloat16 for a float32 one; on a CPU it is float32.",
    )
    quantization: WeightFormat = Field(
        "none",
        description="Format of the layers' weights: "
        + "; ".join(f"`{name}`, {meaning}" for name, meaning in WEIGHT_FORMATS.items())
        + ".",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="Number format of the KV cache; `fp8` holds twice the tokens."
    )
    tensor_parallel: int = Field(
        1, ge=1, description="Devices that share the model; threads and memory are each one's."
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Threads of a step on the CPU; as many as affinity and the control group's CPU"
        " quota allow.",
    )
    kv_cache_memory: ByteSize | None = Field(
        None,
        gt=0,
        description="Memory for the KV cache; 256MiB, or on CUDA what is left of the device's.",
    )
    device_memory_share: float = Field(
        0.9, gt=0, le=1, description="Share of a CUDA device to use, without kv_cache_memory."
    )
    block_size: int = Field(16, ge=1, le=1024, description="Tokens per block of the KV cache.")
    max_model_len: int | None = Field(
        None, ge=2, description="Most tokens of prompt and completion; what the model allows."
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="Most tokens computed in one step; 8192 on CUDA, else 512."
    )
    max_batch_requests: int | None = Field(
        None, ge=1, description="Most completions in one step; 256 on CUDA, else 64."
    )
    max_mixed_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of a step in which somebody decodes: the smaller, the steadier"
        " are streams beside long prompts; 2048 on CUDA, else max_batch_tokens.",
    )
    max_waiting_requests: int = Field(256, ge=1, description="Most completions in the queue.")
    max_waiting_tokens: int = Field(1_000_000, ge=1, description="Most prompt tokens in the queue.")
    max_waiting_bytes: ByteSize = Field(
        ByteSize(64 * 1024**2), gt=0, description="Most memory of the requests in the queue."
    )
    max_queue_seconds: float | None = Field(
        None,
        gt=0,
        description="Longest wait for a first step; `none` leaves it to the deadline.",
    )
    prefix_caching: bool = Field(
        True, description="Reuse the KV cache of prompts that begin alike, within a tenant."
    )
    mixed_graphs: bool = Field(
        True, description="On one CUDA device small steps with prompts run as graphs, too."
    )
    max_messages_per_second: int = Field(
        5000,
        ge=1,
        description="Most messages sent in a second, all streams together, besides their first and"
        " last: with more tokens than that, several share one.",
    )
    stall_seconds: float = Field(
        60.0,
        gt=0,
        description="Time without a finished step after which the engine reports NOT_SERVING.",
    )
    reader_stall_seconds: float = Field(
        30.0,
        gt=0,
        description="Time after which a client that does not read loses its stream.",
    )
    load_report_seconds: float = Field(
        1.0,
        ge=0.01,
        description="Longest time between two reports of the load; gateways that hear nothing for"
        " longer than their engine_silence_seconds take the engine for frozen.",
    )
    max_buffered_tokens: int = Field(
        4096, ge=1, description="Unread tokens of a stream from which that time counts."
    )
    max_buffered_bytes: ByteSize = Field(
        ByteSize(256 * 1024**2),
        gt=0,
        description="Most memory of unread tokens and log-probabilities of all streams; beyond it"
        " the stream with the most loses its client. Raise it where many score long prompts.",
    )

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        config = self.engine_config()
        if config.max_batch_requests > config.max_batch_tokens:
            raise ValueError("max_batch_requests is more than max_batch_tokens")
        if config.max_batch_requests > config.mixed_step_tokens:
            raise ValueError("max_batch_requests is more than max_mixed_tokens")
        if (self.max_mixed_tokens or 0) > config.max_batch_tokens:
            raise ValueError("max_mixed_tokens is more than max_batch_tokens")
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError(
                "dtype float16 is slow on a CPU: leave it at auto, which is float32 there, or take"
                " bfloat16 to save memory"
            )
        if self.tensor_parallel > 1 and self.device not in ("cpu", "cuda"):
            raise ValueError(f"tensor_parallel takes device cpu or cuda, not {self.device}")
        return self

    @property
    def served_name(self) -> str:
        """The name that requests give."""
        return self.model_name or model_name(self.model)

    def engine_config(self) -> EngineConfig:
        """What the core is built from, with what the device decides resolved."""
        is_cuda = self.device.startswith("cuda")
        requests, tokens = (256, 8192) if is_cuda else (64, 512)
        requests = self.max_batch_requests or requests
        mixed = max(2048, requests) if is_cuda else None
        memory = None if is_cuda else 256 * 1024**2
        return EngineConfig(
            model_path=self.model,
            device=self.device,
            dtype=self.dtype,
            num_threads=self.threads,
            kv_cache_bytes=memory if self.kv_cache_memory is None else int(self.kv_cache_memory),
            device_memory_share=self.device_memory_share,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_batch_tokens=self.max_batch_tokens or tokens,
            max_batch_requests=requests,
            max_mixed_tokens=self.max_mixed_tokens or mixed,
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
            max_waiting_bytes=int(self.max_waiting_bytes),
            max_queue_seconds=self.max_queue_seconds,
            prefix_caching=self.prefix_caching,
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            tensor_parallel=self.tensor_parallel,
            mixed_graphs=self.mixed_graphs,
            max_messages_per_second=self.max_messages_per_second,
        )

    def patience(self) -> Patience:
        """How long the engine waits for steps and readers."""
        return Patience(
            self.stall_seconds,
            self.reader_stall_seconds,
            self.max_buffered_tokens,
            int(self.max_buffered_bytes),
        )
