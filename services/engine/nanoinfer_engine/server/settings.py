"""Settings of the engine service: those of the core, and those of its gRPC server.

A setting of the core is declared once, as a field of `EngineConfig` or `Patience`; its flag,
environment variable and validation follow from the declaration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_type_hints

from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.model_paths import model_name
from pydantic import ByteSize, Field, create_model, model_validator

from nanoinfer_engine.core.config import EngineConfig
from nanoinfer_engine.core.settings import flag_of, setting_of
from nanoinfer_engine.core.watchdog import Patience

Settings = TypeVar("Settings", bound=ServiceSettings)


def with_fields_of(*kinds: type[Any]) -> Callable[[type[Settings]], type[Settings]]:
    """Class decorator that adds a setting for each field of the dataclasses `kinds`."""

    def extend(cls: type[Settings]) -> type[Settings]:
        added: dict[str, Any] = {}
        for kind in kinds:
            hints = get_type_hints(kind)
            for each in dataclasses.fields(kind):
                added[flag_of(each)] = _declaration(each, hints[each.name])
        return create_model(
            cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **added
        )

    return extend


def _declaration(field: dataclasses.Field[Any], annotation: Any) -> tuple[Any, Any]:
    """Type and field, as pydantic takes them."""
    described = setting_of(field)
    may_be_unset = described.follows_device or isinstance(None, annotation)
    if described.choices:
        annotation = Literal[described.choices]
    elif described.in_bytes:
        annotation = ByteSize
    default = None if described.follows_device else field.default
    return annotation | None if may_be_unset else annotation, Field(
        ... if default is dataclasses.MISSING else default,
        description=described.help,
        ge=described.ge,
        gt=described.gt,
        le=described.le,
    )


@with_fields_of(EngineConfig, Patience)
class EngineSettings(ServiceSettings):
    """Flags, environment and file of `python -m nanoinfer_engine`; `--model` alone is required."""

    port: int = Field(50053, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(
        9093, ge=0, le=65535, description="Port of /metrics; 0 takes a free one, `none` is off."
    )
    trust_incoming_trace: bool = Field(
        True, description="Continue the caller's trace: inside a cluster the gateway is trusted."
    )
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
    load_report_seconds: float = Field(
        1.0,
        ge=0.01,
        description="Longest time between two reports of the load; gateways that hear nothing for"
        " longer than their engine_silence_seconds take the engine for frozen.",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        config = self.engine_config()
        if config.max_batch_requests > config.max_batch_tokens:
            raise ValueError("max_batch_requests is more than max_batch_tokens")
        if config.max_batch_requests > config.mixed_step_tokens:
            raise ValueError("max_batch_requests is more than max_mixed_tokens")
        if (config.max_mixed_tokens or 0) > config.max_batch_tokens:
            raise ValueError("max_mixed_tokens is more than max_batch_tokens")
        if config.dtype == "float16" and config.device == "cpu":
            raise ValueError(
                "dtype float16 is slow on a CPU: leave it at auto, which is float32 there, or take"
                " bfloat16 to save memory"
            )
        if config.tensor_parallel > 1 and config.device not in ("cpu", "cuda"):
            raise ValueError(f"tensor_parallel takes device cpu or cuda, not {config.device}")
        return self

    @property
    def served_name(self) -> str:
        """The name that requests give."""
        return self.model_name or model_name(self.engine_config().model_path)

    def engine_config(self) -> EngineConfig:
        """Configuration of the core, with the defaults of the device."""
        return EngineConfig.from_settings(self._values_of(EngineConfig))

    def patience(self) -> Patience:
        """How long the engine waits for steps and readers."""
        return Patience(**self._values_of(Patience))

    def _values_of(self, kind: type[Any]) -> dict[str, Any]:
        """Values of a dataclass's fields."""
        found = {}
        for each in dataclasses.fields(kind):
            value = getattr(self, flag_of(each))
            found[each.name] = int(value) if isinstance(value, ByteSize) else value
        return found
