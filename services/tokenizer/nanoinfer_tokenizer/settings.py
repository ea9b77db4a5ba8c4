"""What the tokenizer service can be told; `nanoinfer_common.config` says where values come from."""

from pathlib import Path
from typing import Literal

from nanoinfer_common.config import ServiceSettings
from pydantic import Field

from nanoinfer_tokenizer.loading import RankFileOptions
from nanoinfer_tokenizer.template_process import TemplateLimits


class TokenizerSettings(ServiceSettings):
    """The tokenizer's settings. Times are in seconds."""

    port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(
        9092, ge=0, le=65535, description="Port of /metrics; 0 takes a free one, `none` is off."
    )
    trust_incoming_trace: bool = Field(
        True, description="Continue the caller's trace: inside a cluster the gateway is trusted."
    )
    model: Path = Field(description="Model directory, or a checkpoint that brings no tokenizer.")
    tokenizer: Path | None = Field(
        None,
        description="Directory, tokenizer.json or .tiktoken file; unset means the model's own.",
    )
    pattern: Literal["gpt2", "llama3", "qwen2", "qwen3.5", "o200k", "tekken"] = Field(
        "gpt2", description="Pre-tokenizer pattern of a .tiktoken file."
    )
    special_tokens: tuple[str, ...] | None = Field(
        None, description="Special tokens after a .tiktoken file's last rank; unset: the pattern's."
    )
    # tiktoken's regular expressions overflow their stack at about a million spaces.
    max_characters: int = Field(
        500_000, ge=1, le=750_000, description="Most characters, or ids to decode, in a request."
    )
    max_batch_texts: int = Field(256, ge=1, le=65536, description="Most texts in one batch.")
    max_pending: int = Field(
        1024,
        ge=1,
        description="Most requests that wait or are worked on, short and long ones (over 16,384"
        " characters) counted apart; more are refused.",
    )
    num_threads: int = Field(
        2,
        ge=1,
        le=256,
        description="Threads that encode short texts; as many again encode long ones.",
    )
    num_template_workers: int = Field(
        2,
        ge=1,
        le=64,
        description="Processes that render short conversations; as many again, started when they"
        " are needed, render long ones.",
    )
    template_timeout_seconds: float = Field(
        2.0, gt=0, le=60, description="Longest that one chat template may run."
    )

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer is."""
        return self.tokenizer or self.model

    @property
    def rank_file(self) -> RankFileOptions | None:
        """What completes a `.tiktoken` file; None where nothing was set."""
        if self.model_fields_set.isdisjoint({"pattern", "special_tokens"}):
            return None
        return RankFileOptions(self.pattern, self.special_tokens)

    @property
    def template_limits(self) -> TemplateLimits:
        """Bounds of a chat template; markup may double what was said."""
        return TemplateLimits(
            timeout_seconds=self.template_timeout_seconds,
            max_characters=2 * self.max_characters + 65536,
            num_workers=2 * self.num_template_workers,  # for short and for long conversations
        )
