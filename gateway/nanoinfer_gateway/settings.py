"""What the gateway can be told; see `nanoinfer_common.config` for where values come from."""

from nanoinfer_common.config import ServiceSettings
from pydantic import Field, field_validator

from nanoinfer_gateway.upstreams import addresses


class GatewaySettings(ServiceSettings):
    """The gateway's settings. Times are in seconds."""

    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(
        9091, ge=0, le=65535, description="Port of /metrics; 0 takes a free one, `none` is off."
    )
    tokenizer: tuple[str, ...] = Field(
        ("127.0.0.1:50052",),
        min_length=1,
        description="Tokenizer addresses; names are looked up again and again, replica by replica.",
    )
    engine: tuple[str, ...] = Field(
        ("127.0.0.1:50053",),
        min_length=1,
        description="Engine addresses; names are looked up again and again, replica by replica.",
    )
    resolve_seconds: float = Field(
        5.0, gt=0, description="Time between look-ups of the tokenizers' and engines' names."
    )
    silence_seconds: float = Field(
        3.0,
        gt=0,
        description="Time without a sign of life after which a tokenizer or an engine gets no more"
        " requests, until it reports again; larger where machines are so busy that processes get"
        " no turn for seconds.",
    )
    tokenizer_timeout_seconds: float = Field(
        5.0,
        gt=0,
        description="Longest that a call to a tokenizer takes; it is then tried once more, on"
        " another one.",
    )
    max_message_bytes: int = Field(
        2 * 1024**2,
        ge=1024,
        description="Bytes of the largest request message that is taken; 2 MiB are 1 MiB of text"
        " with options, or 700,000 token ids.",
    )
    max_received_bytes: int = Field(
        64 * 1024**2,
        ge=1024,
        description="Most bytes of request messages at one time: half for those being received,"
        " which count as the largest, half for those of running calls; more are refused.",
    )
    max_unsent_bytes: int = Field(
        64 * 1024**2,
        ge=1024,
        description="Bytes of answers that clients were sent and do not take, from which on new"
        " calls are refused.",
    )
    max_answer_bytes: int = Field(
        8 * 1024**2,
        ge=1024,
        description="Most bytes of a whole answer; larger ones must be streamed. The clients take"
        " 8 MiB, other gRPC clients 4 MiB by default.",
    )
    max_buffered_bytes: int = Field(
        32 * 1024**2,
        ge=1024,
        description="Most bytes of all answers in memory: whole ones that are not complete and"
        " what readers have not taken. Each takes some four times as much memory.",
    )
    max_requests: int = Field(512, ge=1, description="Most generations under way.")
    max_prompt_tokens: int = Field(
        1_000_000, ge=1, description="Most prompt tokens of all generations under way."
    )
    max_prompt_bytes: int = Field(
        32 * 1024 * 1024, ge=1, description="Most prompt bytes of all generations under way."
    )
    max_request_prompt_bytes: int = Field(
        1024 * 1024,
        ge=1,
        description="Most bytes of text in one prompt or conversation,"
        " of which each part counts 32 more.",
    )
    max_tenant_requests: int | None = Field(
        None, ge=1, description="Most generations under way of one tenant; `none` is no bound."
    )
    num_write_slots: int = Field(
        8, ge=1, description="Stream messages written at one time; more piles up and merges."
    )
    stall_seconds: float = Field(
        60.0, gt=0, description="Longest that a reader may take no message."
    )
    ready_without_upstreams: bool = Field(
        False, description="Report readiness even while no tokenizer or engine answers."
    )

    @field_validator("tokenizer", "engine")
    @classmethod
    def _addresses_have_a_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(addresses.check(address) for address in value)
