"""The flags of every generation option, under the library's names, and where prompts come from."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from nanoinfer.base import DEFAULT_TARGET
from nanoinfer.cli.console import Progress
from nanoinfer.client import Client

Target = Annotated[str, typer.Option(help="The gateway's address.", envvar="NANOINFER_TARGET")]
ConnectTimeout = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for the gateway to be ready.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PromptArgument = Annotated[
    str | None, typer.Argument(help="The prompt; `-` or nothing reads standard input.")
]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
TARGET = DEFAULT_TARGET
CONNECT_TIMEOUT = 5.0


class _Flag(NamedTuple):
    name: str
    kind: Any
    panel: str
    help: str


_FLAGS = (
    _Flag("max_tokens", int, "Stopping", "Most tokens to produce."),
    _Flag("min_tokens", int, "Stopping", "Tokens to produce before anything may end it."),
    _Flag("stop", list[str], "Stopping", "String that ends the completion; repeatable."),
    _Flag("stop_token_ids", list[int], "Stopping", "Id that ends the completion; repeatable."),
    _Flag("ignore_eos", bool, "Stopping", "Treat the end of sequence as an ordinary token."),
    _Flag("include_stop_in_output", bool, "Stopping", "Leave what ended it in the output."),
    _Flag("temperature", float, "Sampling", "0 is greedy, at most 2."),
    _Flag("top_p", float, "Sampling", "Keep the likeliest tokens up to this probability."),
    _Flag("top_k", int, "Sampling", "Keep this many tokens; 0 is off."),
    _Flag("min_p", float, "Sampling", "Drop tokens below this share of the likeliest one."),
    _Flag("repetition_penalty", float, "Sampling", "Above 1 makes repetition less likely."),
    _Flag("frequency_penalty", float, "Sampling", "Penalty for each occurrence."),
    _Flag("presence_penalty", float, "Sampling", "Penalty for having occurred."),
    _Flag("seed", int, "Sampling", "Seed of the random numbers."),
    _Flag("n", int, "Sampling", "Number of completions."),
    _Flag("logit_bias", list[str], "Sampling", "ID=BIAS added to a logit; repeatable."),
    _Flag("allowed_token_ids", list[int], "Sampling", "Only these ids; repeatable."),
    _Flag("logprobs", int, "Response", "Report log-probabilities and this many alternatives."),
    _Flag("prompt_logprobs", int, "Response", "The same for the prompt's tokens."),
    _Flag("logprob_token_ids", list[int], "Response", "Report these ids; repeatable."),
    _Flag("return_token_ids", bool, "Response", "Return token ids (with --json)."),
    _Flag("echo", bool, "Response", "Put the prompt before the completion."),
    _Flag("skip_special_tokens", bool, "Response", "Leave special tokens out of the text."),
    _Flag("json_schema", str, "Shape", "JSON Schema that the output must satisfy."),
    _Flag("json_object", bool, "Shape", "Any JSON object."),
    _Flag("regex", str, "Shape", "Regular expression that the output must match."),
    _Flag("grammar", str, "Shape", "Grammar in Lark form."),
    _Flag("choices", list[str], "Shape", "String that the output may be; repeatable."),
    _Flag("model", str, "Request", "Name of the served model."),
    _Flag("truncate_prompt_tokens", int, "Request", "Keep this many of the prompt's last ids."),
    _Flag("cache_salt", str, "Request", "Separates prefix-cache entries."),
    _Flag("request_id", str, "Request", "Label of the request in logs and traces."),
    _Flag("priority", int, "Request", "-100 to 100, higher first."),
    _Flag("tenant", str, "Request", "Who asks."),
    _Flag("timeout", float, "Request", "Seconds until the request is given up."),
    _Flag("metadata", list[str], "Request", "KEY=VALUE sent beside the request; repeatable."),
)


def generation_flags(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb every flag but those named; it receives what was set as `options`."""
    flags = [flag for flag in _FLAGS if flag.name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.name != "options"]

        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            given = {flag.name: arguments.pop(flag.name) for flag in flags}
            command(**arguments, options=_options(given))

        parameters = [*own, *(_parameter(flag) for flag in flags)]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _parameter(flag: _Flag) -> inspect.Parameter:
    word = flag.name.replace("_", "-")
    declaration = f"--{word}/--no-{word}" if flag.kind is bool else f"--{word}"
    option = typer.Option(
        declaration, help=flag.help, rich_help_panel=flag.panel, show_default=False
    )
    annotation: Any = Annotated[flag.kind | None, option]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(flag.name, kind, default=None, annotation=annotation)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in given.items() if value not in (None, [])}
    if "logit_bias" in options:
        pairs = _pairs("--logit-bias", options["logit_bias"])
        try:
            options["logit_bias"] = {int(key): float(value) for key, value in pairs}
        except ValueError as error:
            raise typer.BadParameter(f"--logit-bias takes ID=BIAS: {error}") from None
    if "metadata" in options:
        options["metadata"] = dict(_pairs("--metadata", options["metadata"]))
    return options


def _pairs(flag: str, values: Sequence[str]) -> Iterator[tuple[str, str]]:
    for value in values:
        key, equals, rest = value.partition("=")
        if not equals:
            raise typer.BadParameter(f"{flag} takes KEY=VALUE, not {value!r}")
        yield key, rest


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


def default_model() -> Path | None:
    """`NANOINFER_MODEL`, else `models/guide` here or in the checkout that this file lies in."""
    if named := os.environ.get("NANOINFER_MODEL"):
        return Path(named)
    checkout = Path(__file__).resolve().parents[4]
    found = (root / "models" / "guide" for root in (Path.cwd(), checkout))
    return next((path for path in found if (path / "config.json").is_file()), None)


@contextmanager
def connect(target: str, connect_timeout: float) -> Iterator[Client]:
    """A client whose gateway is ready."""
    with Client(target) as client:
        with Progress(f"waiting for {target}"):
            client.wait_until_ready(connect_timeout)
        yield client
