"""Settings: flags > environment (`NANOINFER_<SETTING>`) > YAML (`--config`) > defaults.

One frozen, flat object per process, validated when it is built. A value that is set but invalid
ends the start with exit code 2 and a line that names the setting and where the value came from.
"""

import argparse
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

ENV_PREFIX = "NANOINFER_"


class ServiceSettings(BaseSettings):
    """What every service can be told. Services subclass it and add fields of their own.

    Built directly, it reads keyword arguments and the environment; `parse_settings` adds flags and
    a file. Times are in seconds.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(0, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    port_file: Path | None = Field(
        None, description="File that gets the line `listening on HOST:PORT` once the port is open."
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port of /metrics; 0 takes a free one, `none` is off."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log entries that are written."
    )
    log_format: Literal["json", "console"] = Field("json", description="Form of the log.")
    reflection: bool = Field(True, description="Serve gRPC reflection.")
    max_message_bytes: int = Field(
        2**23, ge=1024, description="Bytes of the largest request message that is taken."
    )
    max_received_bytes: int = Field(
        2**27,
        ge=1024,
        description="Most bytes of request messages at one time: half for those being received,"
        " which count as the largest, half for those of running calls; more are refused.",
    )
    max_unsent_bytes: int = Field(
        2**27,
        ge=1024,
        description="Bytes of answers that clients were sent and do not take, from which on new"
        " calls are refused.",
    )
    default_deadline_seconds: float = Field(
        300.0, gt=0, description="Deadline where none is given."
    )
    max_deadline_seconds: float = Field(3600.0, gt=0, description="Longer deadlines are cut.")
    drain_delay_seconds: float = Field(
        0.0, ge=0, description="Time to serve on after NOT_SERVING, before new calls are refused."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time for admitted work to finish.")
    max_connection_age_seconds: float | None = Field(
        None, gt=0, description="Age at which a client must reconnect."
    )
    max_connection_idle_seconds: float | None = Field(
        3600.0, gt=0, description="Time without a call after which a connection is closed."
    )
    trust_incoming_trace: bool = Field(
        False, description="Continue callers' traces, not link them."
    )
    trace_proxy: bool = Field(
        False,
        description="Send spans to the collector through the environment's http_proxy or "
        "grpc_proxy; for collectors that are reached in no other way. Calls between services "
        "never use one.",
    )
    metrics_prefix: str = Field(
        "vllm:", pattern=r"^[a-zA-Z_:]*$", description="Prefix of the engine metrics' names."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_means_unset(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        unset = isinstance(value, str) and value.lower() == "none"
        return None if unset and type(None) in typing.get_args(field.annotation) else value

    @model_validator(mode="after")
    def _deadlines_fit(self) -> Self:
        if self.default_deadline_seconds > self.max_deadline_seconds:
            raise ValueError("default_deadline_seconds is more than max_deadline_seconds")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Reads keyword arguments, then the environment; nothing else."""
        return init_settings, Environment(settings_cls)


class Environment(EnvSettingsSource):
    """Reads lists as `a,b` besides JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Turns a variable's text into the field's raw value."""
        if isinstance(value, str) and _is_list(field) and not value.lstrip().startswith("["):
            return _split(value)
        return super().decode_complex_value(field_name, field, value)


Settings = TypeVar("Settings", bound=ServiceSettings)


def parse_settings(cls: type[Settings], argv: Sequence[str], program: str) -> Settings:
    """Builds the settings of `program` from flags, environment, file and defaults.

    `--dry-run` prints the result, secrets masked, and exits 0. Anything invalid exits 2.
    """
    parser = _parser(cls, program)
    arguments = vars(parser.parse_args(argv))
    config = arguments.pop("config", None) or os.environ.get(f"{ENV_PREFIX}CONFIG")
    dry_run = arguments.pop("dry_run", False)
    try:
        file_values = _read_file(cls, Path(config)) if config else {}
        environment = Environment(cls)()
        settings = cls(**{**file_values, **environment, **arguments})
    except ValidationError as error:
        _refuse(parser, error, arguments, file_values, str(config))
    except (SettingsError, ValueError, OSError) as error:
        parser.exit(2, f"{program}: {error}\n")
    if dry_run:
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")
        parser.exit(0)
    return settings


def _parser(cls: type[ServiceSettings], program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings.")
    parser.add_argument("--dry-run", action="store_true", help="Print the settings and exit.")
    for name, field in cls.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        text = f"{field.description or ''} [{ENV_PREFIX}{name.upper()}]".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
        elif _is_list(field):
            parser.add_argument(flag, dest=name, action="extend", type=_split, help=text)
        else:
            parser.add_argument(flag, dest=name, metavar=name.upper(), help=text)
    return parser


def _read_file(cls: type[ServiceSettings], path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of settings")
    unknown = sorted(str(key) for key in values if key not in cls.model_fields)
    if unknown:
        raise ValueError(f"{path}: unknown setting {', '.join(unknown)}")
    return values


def _refuse(
    parser: argparse.ArgumentParser,
    error: ValidationError,
    arguments: Mapping[str, object],
    file_values: Mapping[str, object],
    config: str,
) -> NoReturn:
    lines = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        variable = f"{ENV_PREFIX}{name.upper()}"
        if name in arguments:
            source = f"--{name.replace('_', '-')}"
        elif variable in os.environ:
            source = variable
        elif name in file_values:
            source = f"{config}: {name}"
        else:
            source = name or "settings"
        shown = "" if problem["type"] == "missing" or not name else f" (got {problem['input']!r})"
        lines.append(f"{parser.prog}: {source}: {problem['msg']}{shown}\n")
    parser.exit(2, "".join(lines))


def _is_list(field: FieldInfo) -> bool:
    options = [field.annotation]
    if isinstance(field.annotation, types.UnionType):
        options = list(typing.get_args(field.annotation))
    return any(typing.get_origin(option) in (list, tuple, set, frozenset) for option in options)


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]
