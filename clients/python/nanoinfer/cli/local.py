"""The verbs `up` and `trace`: a stack on this machine, and one request seen through its spans."""

from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nanoinfer.cli import arguments, console, state
from nanoinfer.cli.answers import conversation
from nanoinfer.cli.arguments import CONNECT_TIMEOUT, ConnectTimeout, Json, PromptArgument, System

Model = Annotated[
    Path | None,
    typer.Option(help="Model directory or checkpoint; default NANOINFER_MODEL, models/guide."),
]
Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer of a model that brings none.")]
Threads = Annotated[int | None, typer.Option(min=1, help="The engine's CPU threads.")]
StartTimeout = Annotated[float, typer.Option(min=1, help="Seconds until all must be ready.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The gateway's port; 0 is a free one.")]
CollectorPort = Annotated[
    int, typer.Option(min=0, max=65535, help="The OTLP receiver's port; 0 is a free one.")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(min=0, max=65533, help="The gateway's /metrics; the others take the next two."),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option(help="Show the services' logs from this level on."),
]
START_TIMEOUT = 300.0


def up(
    model: Model = None,
    tokenizer: Tokenizer = None,
    port: Port = 50051,
    collector_port: CollectorPort = 0,
    metrics_port: MetricsPort = None,
    threads: Threads = None,
    start_timeout: StartTimeout = START_TIMEOUT,
    log_level: LogLevel = None,
    json: Json = False,
) -> None:
    """Start tokenizer, engine and gateway here; Ctrl-C ends them.

    Other settings reach the services through their environment variables (NANOINFER_...).
    """
    stack = _load("nanoinfer.cli.stack")
    settings = stack.StackSettings(
        model=_model(model),
        tokenizer=tokenizer,
        threads=threads,
        port=port,
        collector_port=collector_port,
        metrics_port=metrics_port,
        start_timeout=start_timeout,
        log_level=log_level or "warning",
        forward_logs=log_level is not None,
    )
    stack.run_until_told(settings, as_json=json)


def trace(
    prompt: PromptArgument = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    target: Annotated[str | None, typer.Option(help="A running gateway to use instead.")] = None,
    collector: Annotated[str | None, typer.Option(help="Where that one's spans go.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="A prompt to complete, not a chat.")] = False,
    system: System = None,
    threads: Threads = None,
    start_timeout: StartTimeout = START_TIMEOUT,
    connect_timeout: ConnectTimeout = CONNECT_TIMEOUT,
    json: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Run one prompt and draw its span waterfall.

    Uses --target, else starts the services for --model, else a running `up`, else starts the
    services for the default model.
    """
    if raw and system is not None:
        raise typer.BadParameter("--system belongs to a chat, not to --raw")
    own = model is not None or tokenizer is not None or threads is not None
    if own and (target or collector):
        raise typer.BadParameter("--target is a running model; --model starts another")
    if collector and not target:
        raise typer.BadParameter("--collector belongs to a --target")
    text = arguments.read_prompt(prompt)
    tracing, stack = _load("nanoinfer.cli.tracing"), _load("nanoinfer.cli.stack")
    asked = text if raw else conversation(text, system)
    with stack.Interrupts() as interrupts, interrupts.exit_code(), ExitStack() as exits:
        running = None if own else state.find(target)
        if target:
            collector = collector or (running.collector if running else None)
            if collector is None:
                raise typer.BadParameter(f"no `up` of yours at {target}: name its --collector")
        elif running:
            target, collector = running.target, running.collector
        else:
            settings = stack.StackSettings(
                _model(model), tokenizer, threads, start_timeout=start_timeout
            )
            started = exits.enter_context(stack.Stack(settings, interrupts))
            target, collector = started.address, started.collector
        with interrupts.raising():
            tracing.run(target, collector, asked, options, connect_timeout, as_json=json)


def _load(module: str) -> Any:
    """A module that needs more than the `cli` extra; what is missing is named."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("opentelemetry"):
            raise
        hint = "pip install 'nanoinfer[all]'"
        raise console.CommandError(f"up and trace need {error.name}: {hint}") from error


def _model(model: Path | None) -> Path:
    chosen = model or arguments.default_model()
    if chosen is None:
        raise typer.BadParameter("no model: give --model, or set NANOINFER_MODEL")
    if not chosen.exists():
        raise typer.BadParameter(f"no such model: {chosen}")
    return chosen
