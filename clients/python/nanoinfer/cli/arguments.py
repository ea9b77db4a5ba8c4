"""The verbs' flags: those of the gateway, of a stack, and of every generation option.

A verb's parameter whose type is a dataclass stands for a flag for each of its annotated fields;
`options` stands for the generation options, under the library's names.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from opentelemetry.trace import TracerProvider

from nanoinfer.base import DEFAULT_TARGET
from nanoinfer.cli import console
from nanoinfer.client import Client
from nanoinfer.options import Options
from nanoinfer.targets import check_target

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PromptArgument = Annotated[
    str | None, typer.Argument(help="The prompt; `-` or nothing reads standard input.")
]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
ConnectTimeout = Annotated[float, typer.Option(min=0.001, help="Seconds to wait for the gateway.")]
Target = Annotated[str, typer.Option(help="The gateway's address.", envvar="NANOINFER_TARGET")]
Proxy = Annotated[
    bool,
    typer.Option(help="Use the environment's proxy; without, none.", envvar="NANOINFER_USE_PROXY"),
]
_Level = Literal["debug", "info", "warning", "error"]
_LogLevel = typer.Option(help="Show logs from here on.", envvar="NANOINFER_LOG_LEVEL")
_LISTEN = "Where to listen; 0 is a free port."
_Port = typer.Option(min=0, max=65535, help=_LISTEN, envvar="NANOINFER_PORT")
_Host = typer.Option(help="Address where the gateway listens.", envvar="NANOINFER_HOST")
_CollectorPort = typer.Option(min=0, max=65535, help=_LISTEN)
_MetricsPort = typer.Option(
    min=0, max=65533, help="First of three ports with /metrics.", envvar="NANOINFER_METRICS_PORT"
)


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    target: Target = DEFAULT_TARGET
    connect_timeout: ConnectTimeout = 5.0
    use_proxy: Proxy = False

    @contextmanager
    def connect(self, tracer_provider: TracerProvider | None = None) -> Iterator[Client]:
        """A client whose gateway is ready."""
        check_address("--target", self.target)
        with Client(
            self.target,
            connect_timeout=self.connect_timeout,
            tracer_provider=tracer_provider,
            use_proxy=self.use_proxy,
        ) as client:
            with console.Progress(f"waiting for {self.target}"):
                client.wait_until_ready(self.connect_timeout)
            yield client


@dataclass(frozen=True)
class StackSettings:
    """What to run on this machine; `commands` replaces the services' own."""

    model: Annotated[Path | None, typer.Option(help="Model directory or checkpoint file.")] = None
    tokenizer: Annotated[Path | None, typer.Option(help="Where the model brings none.")] = None
    threads: Annotated[int | None, typer.Option(min=1, help="The engine's CPU threads.")] = None
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds to get ready in.")] = 300.0
    log_level: Annotated[_Level | None, _LogLevel] = None
    commands: Mapping[str, Sequence[str]] | None = None


@dataclass(frozen=True)
class Ports:
    """Where the gateway and the span collector listen; metrics: gateway, tokenizer, engine."""

    port: Annotated[int, _Port] = 50051
    collector_port: Annotated[int, _CollectorPort] = 0
    metrics_port: Annotated[int | None, _MetricsPort] = None
    host: Annotated[str, _Host] = "127.0.0.1"


def check_address(flag: str, address: str) -> None:
    """Makes a usage error of an address that cannot be meant."""
    try:
        check_target(address)
    except ValueError as error:
        raise typer.BadParameter(f"{flag}: {error}") from error


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """A command with its flags, whose exceptions become messages and exit codes."""
    signature = inspect.signature(command)
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, own in signature.parameters.items():
        if name == "options":
            hints = get_type_hints(Options, include_extras=True)
            found = [_generation_flag(n, h) for n, h in hints.items() if n not in parameters]
            groups[name] = (_options, [each.name for each in found])
        elif is_dataclass(own.annotation):
            found = _fields(own.annotation)
            groups[name] = (own.annotation, [each.name for each in found])
        else:
            found = [own.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters |= {each.name: each for each in found}

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        for name, (build, members) in groups.items():
            given[name] = build(**{member: given.pop(member) for member in members})
        console.guarded(command)(**given)

    wrapper.__annotations__ = {each.name: each.annotation for each in parameters.values()}
    shown = signature.replace(parameters=list(parameters.values()))
    wrapper.__signature__ = shown  # type: ignore[attr-defined]
    return wrapper


def _flag(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    annotated = (item for item in fields(group) if hasattr(hints[item.name], "__metadata__"))
    return [_flag(item.name, hints[item.name], item.default) for item in annotated]


def _generation_flag(name: str, annotation: Any) -> inspect.Parameter:
    union, panel, text = get_args(annotation)
    kind: Any = get_args(union)[0]
    for accepted in get_args(union):
        if get_origin(accepted) is Sequence:
            kind = list[get_args(accepted)[0]]  # type: ignore[misc]
    if get_origin(kind) is Mapping:
        kind = list[str]
    if get_origin(kind) is list:
        text = f"{text} Repeatable."
    word = name.replace("_", "-")
    words = f"--{word}/--no-{word}" if kind is bool else f"--{word}"
    option = typer.Option(words, help=text, rich_help_panel=panel, show_default=False)
    return _flag(name, Annotated[kind | None, option], None)


def _options(**given: Any) -> dict[str, Any]:
    options = {name: value for name, value in given.items() if value not in (None, [])}
    if "logit_bias" in options:
        pairs = _pairs("--logit-bias", options["logit_bias"])
        try:
            options["logit_bias"] = {int(key): float(value) for key, value in pairs.items()}
        except ValueError as error:
            raise typer.BadParameter(f"--logit-bias takes ID=BIAS: {error}") from None
    if "metadata" in options:
        options["metadata"] = _pairs("--metadata", options["metadata"])
    return options


def _pairs(flag: str, values: Sequence[str]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise typer.BadParameter(f"{flag} takes KEY=VALUE, not {value!r}")
    return dict(value.split("=", 1) for value in values)


def interactive() -> bool:
    """Tells whether somebody sits at standard input."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def read_prompt(prompt: str | None) -> str:
    """The argument, or standard input less its last newline. A prompt must come from somewhere."""
    if prompt not in (None, "-"):
        return str(prompt)
    if sys.stdin is not None and not sys.stdin.closed and (prompt == "-" or not interactive()):
        text = sys.stdin.read()
        if text:
            return text.removesuffix("\n")
    raise typer.BadParameter("no prompt: give one as an argument or on standard input")
