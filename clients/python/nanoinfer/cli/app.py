"""The verbs that talk to a running gateway, and `serve`. `local` adds `up` and `trace`."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import grpc
import typer

from nanoinfer import health as grpc_health
from nanoinfer.base import package_version
from nanoinfer.cli import arguments, console
from nanoinfer.cli.answers import Repl, conversation, show
from nanoinfer.cli.arguments import (
    CONNECT_TIMEOUT,
    TARGET,
    ConnectTimeout,
    Json,
    PromptArgument,
    System,
    Target,
)
from nanoinfer.cli.local import trace, up
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
    "engine": ("torch", "numpy", "safetensors", "psutil"),
    "gateway": ("grpc_health", "pydantic_settings", "structlog", "prometheus_client"),
}
Service = Literal["tokenizer", "engine", "gateway"]
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app.command()(console.verb(up))
app.command()(arguments.generation_flags("model")(console.verb(trace)))


@app.command()
@arguments.generation_flags()
@console.verb
def complete(
    prompt: PromptArgument = None,
    target: Target = TARGET,
    connect_timeout: ConnectTimeout = CONNECT_TIMEOUT,
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Complete a raw prompt and stream the continuation."""
    text = arguments.read_prompt(prompt)
    with arguments.connect(target, connect_timeout) as client:
        show(client, text, options, as_json=json)


@app.command()
@arguments.generation_flags()
@console.verb
def chat(
    prompt: PromptArgument = None,
    system: System = None,
    target: Target = TARGET,
    connect_timeout: ConnectTimeout = CONNECT_TIMEOUT,
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Hold a conversation on a terminal; answer one prompt where one is given."""
    if prompt is None and arguments.interactive():
        with arguments.connect(target, connect_timeout) as client:
            Repl(client, system, options, as_json=json).run()
        return
    text = arguments.read_prompt(prompt)
    with arguments.connect(target, connect_timeout) as client:
        show(client, conversation(text, system), options, as_json=json)


@app.command()
@console.verb
def count(
    prompt: PromptArgument = None,
    chat: Annotated[bool, typer.Option("--chat", help="Count it as a user's message.")] = False,
    model: Annotated[str | None, typer.Option(help="Name of the served model.")] = None,
    target: Target = TARGET,
    connect_timeout: ConnectTimeout = CONNECT_TIMEOUT,
    json: Json = False,
) -> None:
    """Count the tokens of a prompt."""
    text = arguments.read_prompt(prompt)
    with arguments.connect(target, connect_timeout) as client:
        num_tokens = client.count_tokens(conversation(text, None) if chat else text, model=model)
    if json:
        console.write_json({"num_tokens": num_tokens})
    else:
        console.write(f"{num_tokens}\n")


@app.command()
@console.verb
def models(
    target: Target = TARGET, connect_timeout: ConnectTimeout = CONNECT_TIMEOUT, json: Json = False
) -> None:
    """List the served models and their defaults."""
    with arguments.connect(target, connect_timeout) as client:
        found = client.models()
    if json:
        console.write_json(found)
        return
    for model in found:
        console.write(_described(model))


def _described(model: generation_pb2.ModelInfo) -> str:
    defaults = (f"{field.name}={value:g}" for field, value in model.default_sampling.ListFields())
    features = (
        generation_pb2.Feature.Name(feature).removeprefix("FEATURE_").lower()
        for feature in model.features
    )
    return (
        f"{model.id}\n"
        f"  {model.architecture}, {model.num_parameters / 1e6:.1f} M parameters, {model.dtype}\n"
        f"  context {model.max_model_len}, output at most {model.max_output_tokens}, "
        f"vocabulary {model.vocab_size}\n"
        f"  defaults  {' '.join(defaults)}\n"
        f"  features  {' '.join(features)}\n"
    )


@app.command()
@console.verb
def health(
    target: Target = TARGET,
    service: Annotated[str, typer.Option(help="Health name to ask for.")] = grpc_health.READINESS,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait.")] = 5.0,
    json: Json = False,
) -> None:
    """Ask whether a server is ready; exit code 3 where it is not."""
    status = grpc_health.check(target, service, timeout)
    if json:
        console.write_json({"target": target, "service": service, "status": status})
    else:
        console.write(f"{status}\n")
    if status != "SERVING":
        raise typer.Exit(3)


@app.command()
@console.verb
def version(json: Json = False) -> None:
    """Print the versions."""
    found = {
        "nanoinfer": package_version(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
    }
    if json:
        console.write_json(found)
    else:
        console.write("".join(f"{name} {value}\n" for name, value in found.items()))


@app.command(context_settings=_PASS_ON)
@console.verb
def serve(
    service: Annotated[Service, typer.Argument(help="Which one.")], context: typer.Context
) -> None:
    """Run one service; what follows its name goes to it (try `serve engine --help`)."""
    missing = [package for package in _EXTRAS[service] if find_spec(package) is None]
    if missing:
        names = ", ".join(missing)
        hint = f"pip install 'nanoinfer[{service}]'"
        raise console.CommandError(f"serve {service} needs {names}: {hint}")
    _replace_process([sys.executable, "-m", f"nanoinfer_{service}", *context.args])


def _replace_process(command: Sequence[str]) -> None:
    sys.stdout.flush()
    os.execv(command[0], list(command))
