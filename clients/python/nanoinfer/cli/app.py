"""The verbs: those that talk to a running gateway, and those that run services."""

import os
import platform
import sys
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import grpc
import typer

from nanoinfer import health as grpc_health
from nanoinfer.base import package_version
from nanoinfer.cli import arguments, console, environment, state
from nanoinfer.cli.answers import conversation, converse, show
from nanoinfer.cli.arguments import Gateway, Json, Ports, PromptArgument, StackSettings, System
from nanoinfer.cli.sampling import chat_options
from nanoinfer.v1 import generation_pb2

app = typer.Typer(
    help="LLM inference as gRPC microservices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# what tells that an extra is not installed
_EXTRAS = {
    "tokenizer": ("tiktoken", "tokenizers", "jinja2"),
    "engine": ("torch", "numpy", "safetensors"),
    "all": ("opentelemetry.sdk", "opentelemetry.proto", "opentelemetry.exporter"),
    "gateway": ("grpc_health", "pydantic_settings", "structlog", "prometheus_client"),
}
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
@arguments.verb
def up(settings: StackSettings, ports: Ports, json: Json = False) -> None:
    """Start tokenizer, engine and gateway here; Ctrl-C ends them.

    The default model is NANOINFER_MODEL, else models/guide here or in this checkout.
    Other settings reach the services through their environment variables (NANOINFER_...). Spans
    stay here for `trace`, unless OTEL_EXPORTER_OTLP_ENDPOINT sends them elsewhere.
    """
    _need("up", "all")
    environment.check_variables()
    stack = import_module("nanoinfer.cli.stack")
    stack.run_until_told(_with_model(settings), ports, as_json=json)


@app.command()
@arguments.verb
def trace(
    settings: StackSettings,
    options: dict[str, Any],
    prompt: PromptArgument = None,
    target: Annotated[str | None, typer.Option(help="A running gateway to use instead.")] = None,
    collector: Annotated[str | None, typer.Option(help="Where that one's spans go.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="A prompt to complete, not a chat.")] = False,
    system: System = None,
    connect_timeout: arguments.ConnectTimeout = Gateway.connect_timeout,
    use_proxy: arguments.Proxy = False,
    json: Json = False,
) -> None:
    """Run one prompt and draw its span waterfall.

    Uses --target, else starts the services for --model, else a running `up`, else starts the
    services for the default model.
    """
    if raw and system is not None:
        raise typer.BadParameter("--system belongs to a chat, not to --raw")
    own = any((settings.model, settings.tokenizer, settings.threads))
    if own and (target or collector):
        raise typer.BadParameter("--target is a running model; --model starts another")
    if collector and not target:
        raise typer.BadParameter("--collector belongs to a --target")
    for flag, address in (("--target", target), ("--collector", collector)):
        if address is not None:
            arguments.check_address(flag, address)
    text = arguments.read_prompt(prompt)
    _need("trace", "all")
    tracing, stack = import_module("nanoinfer.cli.tracing"), import_module("nanoinfer.cli.stack")
    with stack.Interrupts() as interrupts, ExitStack() as exits:
        running = None if own else state.find(target)
        if running is None and target is None:
            environment.check_variables()
            started = stack.Stack(_with_model(settings), interrupts, Ports(port=0))
            running = exits.enter_context(started).running
        elif running is None and collector is None:
            raise typer.BadParameter(f"no `up` of yours at {target}: name its --collector")
        if running is not None:
            target, collector = running.target, collector or running.collector
        if target is None or collector is None:
            elsewhere = f"the spans of `up` at {target} go elsewhere"
            raise typer.BadParameter(f"{elsewhere}: give --target and --collector")
        gateway = Gateway(target, connect_timeout, use_proxy)
        with interrupts.raising():
            asked = text if raw else conversation(text, system)
            tracing.run(gateway, collector, asked, options, as_json=json)


@app.command()
@arguments.verb
def complete(
    gateway: Gateway, options: dict[str, Any], prompt: PromptArgument = None, json: Json = False
) -> None:
    """Complete a raw prompt and stream the continuation."""
    text = arguments.read_prompt(prompt)
    with gateway.connect() as client:
        show(client, text, options, json)


@app.command()
@arguments.verb
def chat(
    gateway: Gateway,
    options: dict[str, Any],
    prompt: PromptArgument = None,
    system: System = None,
    json: Json = False,
) -> None:
    """Hold a conversation on a terminal; answer one prompt where one is given.

    Samples as the flags say, else as the checkpoint states, else at temperature 0.7 and top-p 0.9.
    """
    text = None if prompt is None and arguments.interactive() else arguments.read_prompt(prompt)
    with gateway.connect() as client:
        if text is None:
            converse(client, system, options, json)
        else:
            show(client, conversation(text, system), chat_options(client, options), json)


@app.command()
@arguments.verb
def count(
    gateway: Gateway,
    prompt: PromptArgument = None,
    chat: Annotated[bool, typer.Option("--chat", help="Count it as a user's message.")] = False,
    model: Annotated[str | None, typer.Option(help="Name of the served model.")] = None,
    json: Json = False,
) -> None:
    """Count the tokens of a prompt."""
    text = arguments.read_prompt(prompt)
    with gateway.connect() as client, console.usage_errors():
        num_tokens = client.count_tokens(conversation(text, None) if chat else text, model=model)
    console.show(str(num_tokens), {"num_tokens": num_tokens}, json)


@app.command()
@arguments.verb
def models(gateway: Gateway, json: Json = False) -> None:
    """List the served models and their defaults."""
    with gateway.connect() as client:
        found = client.models()
    console.show("\n".join(map(_described, found)), found, json)


def _described(model: generation_pb2.ModelInfo) -> str:
    defaults = (f"{field.name}={value:g}" for field, value in model.default_sampling.ListFields())
    names = map(generation_pb2.Feature.Name, model.features)
    return (
        f"{model.id}\n"
        f"  {model.architecture}, {model.num_parameters / 1e6:.1f} M parameters, {model.dtype}\n"
        f"  context {model.max_model_len}, output at most {model.max_output_tokens}, "
        f"vocabulary {model.vocab_size}\n"
        f"  defaults  {' '.join(defaults)}\n"
        f"  features  {' '.join(name.removeprefix('FEATURE_').lower() for name in names)}"
    )


@app.command()
@arguments.verb
def health(
    target: arguments.Target = Gateway.target,
    service: Annotated[str, typer.Option(help="Health name to ask for.")] = grpc_health.READINESS,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait.")] = 5.0,
    use_proxy: arguments.Proxy = False,
    json: Json = False,
) -> None:
    """Ask whether a server is ready; exit code 3 where it is not."""
    arguments.check_address("--target", target)
    status = grpc_health.check(target, service, timeout, use_proxy=use_proxy)
    console.show(status, {"target": target, "service": service, "status": status}, json)
    if status != "SERVING":
        raise typer.Exit(3)


@app.command()
@arguments.verb
def version(json: Json = False) -> None:
    """Print the versions."""
    python, grpcio = platform.python_version(), grpc.__version__
    found = {"nanoinfer": package_version(), "python": python, "grpcio": grpcio}
    console.show("\n".join(f"{name} {value}" for name, value in found.items()), found, json)


@app.command(context_settings=_PASS_ON)
@arguments.verb
def serve(
    service: Annotated[
        Literal["tokenizer", "engine", "gateway"], typer.Argument(help="Which one.")
    ],
    context: typer.Context,
) -> None:
    """Run one service; what follows its name goes to it (try `serve engine --help`)."""
    _need(f"serve {service}", service)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", f"nanoinfer_{service}", *context.args])


def _need(what: str, extra: str) -> None:
    """Names the packages that a verb needs beside the `cli` extra's, where they are missing."""
    if missing := [package for package in _EXTRAS[extra] if find_spec(package) is None]:
        hint = f"pip install 'nanoinfer[{extra}]'"
        raise console.CommandError(f"{what} needs {', '.join(missing)}: {hint}")


def _with_model(settings: StackSettings) -> StackSettings:
    named = os.environ.get("NANOINFER_MODEL")
    chosen = settings.model or (Path(named) if named else None)
    for root in (Path.cwd(), Path(__file__).resolve().parents[4]):
        if chosen is None and (root / "models/guide/config.json").is_file():
            chosen = root / "models/guide"
    if chosen is None:
        raise typer.BadParameter("no model: give --model, or set NANOINFER_MODEL")
    if reason := import_module("nanoinfer_common.model_paths").unservable(chosen):
        raise typer.BadParameter(f"{chosen}: {reason}")
    return replace(settings, model=chosen)
