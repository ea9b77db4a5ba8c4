"""The verbs that talk to a gateway, in this process and as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from nanoinfer import Options
from nanoinfer.cli import stack
from nanoinfer.cli.app import app
from nanoinfer.cli.arguments import Ports, StackSettings
from nanoinfer.v1 import gateway_pb2, generation_pb2
from typer.testing import CliRunner

from tests.client.fake_gateway import SUMMARY, Behaviour, finish, refusal, running_gateway
from tests.client.test_client import STREAM, endless

NANOINFER = [sys.executable, "-m", "nanoinfer"]


def run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def run_process(
    arguments: list[str], stdin: Any = subprocess.DEVNULL, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, stdin=stdin, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_complete_streams_the_raw_prompt(target: str, behaviour: Behaviour) -> None:
    result = run("complete", "--target", target, "--temperature", "0", "import os")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello, world\n"
    arrival = behaviour.arrivals[0]
    assert arrival.method == "GenerateStream"
    assert arrival.request.text == "import os"
    assert arrival.request.options.sampling.HasField("temperature")
    assert [field.name for field, _ in arrival.request.options.ListFields()] == ["sampling"]


# every option of the library but its name: the flags' values and what they mean there
FLAGS: dict[str, tuple[list[str], Any]] = {
    "max_tokens": (["5"], 5),
    "min_tokens": (["0"], 0),
    "stop": (["a", "b"], ["a", "b"]),
    "stop_token_ids": (["0", "7"], [0, 7]),
    "ignore_eos": ([], True),
    "include_stop_in_output": ([], True),
    "temperature": (["0.5"], 0.5),
    "top_p": (["0"], 0.0),
    "top_k": (["0"], 0),
    "min_p": (["0"], 0.0),
    "repetition_penalty": (["1.5"], 1.5),
    "frequency_penalty": (["-1"], -1.0),
    "presence_penalty": (["1"], 1.0),
    "no_repeat_ngram_size": (["3"], 3),
    "seed": (["18446744073709551615"], 2**64 - 1),
    "n": (["2"], 2),
    "logit_bias": (["5=-1.5"], {5: -1.5}),
    "allowed_token_ids": (["1"], [1]),
    "logprobs": (["0"], 0),
    "prompt_logprobs": (["0"], 0),
    "logprob_token_ids": (["3"], [3]),
    "return_token_ids": ([], True),
    "echo": ([], True),
    "skip_special_tokens": ([], True),
    "model": (["m"], "m"),
    "truncate_prompt_tokens": (["9"], 9),
    "cache_salt": (["s"], "s"),
    "request_id": (["r"], "r"),
    "parse_special_tokens": ([], True),
}
BESIDE = {"priority": "-5", "tenant": "t", "timeout": "7", "metadata": "x-own=1"}
SHAPES = {"json_schema": "{}", "json_object": None, "regex": "a", "grammar": "g", "choices": "c"}


def test_every_option_of_the_library_is_a_flag() -> None:
    assert {*FLAGS, *BESIDE, *SHAPES} == Options.__optional_keys__


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_flags_reach_the_wire(target: str, behaviour: Behaviour) -> None:
    arguments = ["complete", "--target", target, "x"]
    for name, (values, _) in FLAGS.items():
        arguments += [flag(name)] if not values else [w for v in values for w in (flag(name), v)]
    for name, value in BESIDE.items():
        arguments += [flag(name), value]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    arrival = behaviour.arrivals[0]
    options = arrival.request.options
    holders = (options, options.sampling, options.stopping, options.response, arrival.request)
    for name, (_, expected) in FLAGS.items():
        holder = next(each for each in holders if name in each.DESCRIPTOR.fields_by_name)
        found = getattr(holder, name)
        if isinstance(expected, dict):
            assert dict(found) == expected
        else:
            assert (list(found) if isinstance(expected, list) else found) == expected, name
    assert arrival.metadata["x-nanoinfer-priority"] == "-5"
    assert arrival.metadata["x-nanoinfer-tenant"] == "t"
    assert arrival.metadata["x-own"] == "1"
    assert arrival.seconds_left is not None
    assert arrival.seconds_left <= 7 + 1  # gRPC rounds a deadline up on the wire


@pytest.mark.parametrize("name", SHAPES)
def test_shape_flags(target: str, behaviour: Behaviour, name: str) -> None:
    value = SHAPES[name]
    given = [flag(name)] if value is None else [flag(name), value]
    result = run("complete", "--target", target, "x", *given)
    assert result.exit_code == 0, result.output
    shape = behaviour.arrivals[0].request.options.structured_output
    assert shape.WhichOneof("constraint") == name


def test_a_false_flag_is_present(target: str, behaviour: Behaviour) -> None:
    run("complete", "--target", target, "x", "--no-skip-special-tokens")
    response = behaviour.arrivals[0].request.options.response
    assert response.HasField("skip_special_tokens")
    assert response.skip_special_tokens is False


def test_json(target: str) -> None:
    result = run("complete", "--target", target, "--json", "x")
    answer = json.loads(result.stdout)
    assert answer["choices"][0]["text"] == "Hello, world"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["timings"]["time_to_first_token_ns"] == 6
    assert answer["tokenizer_fingerprint"] == "01" * 32


def test_several_completions(target: str, behaviour: Behaviour) -> None:
    def two(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield STREAM(deltas=[gateway_pb2.TextDelta(index=i, text=f"t{i}") for i in (1, 0)])
        yield STREAM(finishes=[finish(0), finish(1)], summary=SUMMARY)

    behaviour.stream = two
    assert run("complete", "--target", target, "--n", "2", "x").stdout == (
        "--- 0 ---\nt0\n--- 1 ---\nt1\n"
    )


def test_chat_answers_one_prompt(target: str, behaviour: Behaviour) -> None:
    result = run("chat", "--target", target, "--system", "Be brief.", "Hi")
    assert result.stdout == "Hello, world\n"
    messages = behaviour.arrivals[-1].request.messages
    assert [(m.role, m.content[0].text) for m in messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_prompts_come_from_standard_input(
    target: str, behaviour: Behaviour, prompt: list[str]
) -> None:
    result = run("chat", "--target", target, *prompt, stdin="two\nlines\n")
    assert result.exit_code == 0, result.output
    assert behaviour.arrivals[-1].request.messages[0].content[0].text == "two\nlines"


def test_without_a_prompt_it_is_a_usage_error(target: str) -> None:
    for verb in ("chat", "complete", "count", "trace"):
        assert run(verb, stdin="").exit_code == 2, verb


CODES = [
    (grpc.StatusCode.INVALID_ARGUMENT, 4),
    (grpc.StatusCode.NOT_FOUND, 4),
    (grpc.StatusCode.UNIMPLEMENTED, 4),
    (grpc.StatusCode.FAILED_PRECONDITION, 4),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, 5),
    (grpc.StatusCode.DEADLINE_EXCEEDED, 124),
    (grpc.StatusCode.UNAVAILABLE, 3),
    (grpc.StatusCode.INTERNAL, 1),
]


@pytest.mark.parametrize(("code", "expected"), CODES)
def test_exit_codes(
    target: str, behaviour: Behaviour, code: grpc.StatusCode, expected: int
) -> None:
    status = refusal(
        code, "REASON", "what", violations=[("sampling.top_p", "above 0")], retry_after=2
    )

    def refuse(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.abort_with_status(status)
        yield

    behaviour.stream = refuse
    result = run("complete", "--target", target, "--json", "x")
    assert result.exit_code == expected
    assert f"{code.name} (REASON): what" in result.stderr
    assert "sampling.top_p: above 0" in result.stderr
    assert "try again in 2 s" in result.stderr
    described = json.loads(result.stdout)["error"]
    assert described["code"] == code.name
    assert described["violations"] == [{"field": "sampling.top_p", "description": "above 0"}]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["complete", "--max-tokens", "-1", "x"],
        ["complete", "--logit-bias", "5", "x"],
        ["complete", "--logit-bias", "a=b", "x"],
        ["complete", "--regex", "a", "--grammar", "b", "x"],
        ["complete", "--tenant", "ä", "x"],
        ["complete", "--no-such-flag", "x"],
        ["chat", "--tenant", "ä", "x"],
        ["chat", "--metadata", "a b=1", "x"],
        ["chat", "--model", "\udcff", "x"],
        ["count", "\udcff"],
        ["count", "--chat", "\udcff"],
        ["count", "--model", "\udcff", "x"],
        ["trace", "--target", "127.0.0.1:1", "--model", "x", "y"],
        ["trace", "--collector", "127.0.0.1:1", "y"],
        ["trace", "--raw", "--system", "s", "y"],
        ["up", "--model", "MISSING"],
        ["serve", "nothing"],
        ["models", "--target", ""],
    ],
)
def test_usage_errors(arguments: list[str], target: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "no") if each == "MISSING" else each for each in arguments]
    asks = arguments[0] in ("chat", "complete", "count")
    where = ["--target", target] if asks else []
    assert run(*arguments[:1], *where, *arguments[1:]).exit_code == 2


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B"),
        ("no-such-directory", "no such file or directory"),
        ("weights.gguf", "GGUF is not supported"),
        ("adapter", "merge"),
    ],
)
@pytest.mark.parametrize("verb", ["up", "trace"])
def test_a_model_that_cannot_be_served_is_refused_with_advice_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str, model: str, advice: str
) -> None:
    monkeypatch.setattr(stack, "Stack", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    Path("weights.gguf").write_bytes(b"GGUF")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    result = run(verb, "--model", model, *(["x"] if verb == "trace" else []))
    assert result.exit_code == 2
    assert f"{model}: " in result.stderr
    assert advice in result.stderr


UP_ENVIRONMENT = {
    "NANOINFER_PORT": "0",
    "NANOINFER_METRICS_PORT": "9000",
    "NANOINFER_LOG_LEVEL": "error",
}


def test_up_reads_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[StackSettings, Ports]] = []
    monkeypatch.setattr(stack, "run_until_told", lambda *given, as_json: seen.append(given))
    for name, value in UP_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    model = ["--model", str(tmp_path)]
    assert run("up", *model).exit_code == 0
    assert run("up", *model, "--port", "7", "--log-level", "info").exit_code == 0
    assert [ports for _, ports in seen] == [Ports(0, 0, 9000), Ports(7, 0, 9000)]
    assert [settings.log_level for settings, _ in seen] == ["error", "info"]
    for name in UP_ENVIRONMENT:
        monkeypatch.setenv(name, "much")
        assert run("up", *model).exit_code == 2, name
        monkeypatch.delenv(name)
    assert len(seen) == 2


def test_up_listens_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        stack, "run_until_told", lambda settings, ports, as_json: seen.append(ports.host)
    )
    model = ["--model", str(tmp_path)]
    assert run("up", *model).exit_code == 0
    monkeypatch.setenv("NANOINFER_HOST", "127.0.0.2")
    assert run("up", *model).exit_code == 0
    assert run("up", *model, "--host", "127.0.0.3").exit_code == 0
    assert seen == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


@pytest.mark.parametrize("verb", ["up", "trace"])
def test_a_misspelt_variable_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    monkeypatch.setattr(stack, "Stack", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("NANOINFER_MAX_MODEL_LENGTH", "512")
    monkeypatch.setenv("COLUMNS", "200")
    result = run(verb, "--model", str(tmp_path), *(["x"] if verb == "trace" else []))
    assert result.exit_code == 2
    assert "NANOINFER_MAX_MODEL_LENGTH is no setting" in result.stderr
    assert "did you mean NANOINFER_MAX_MODEL_LEN?" in result.stderr


def test_lines_of_grpc_itself_stay_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [*NANOINFER, "up", "--model", str(tmp_path), "--collector-port", port]
        quiet = run_process([*command, "--port", "0"])
        asked = run_process(["env", "GRPC_VERBOSITY=ERROR", *command, "--port", "0"])
    assert (quiet.returncode, asked.returncode) == (1, 1)
    assert quiet.stderr == f"nanoinfer: cannot listen on port {port}: is it in use?\n"
    assert "add_port.cc" in asked.stderr


def test_no_gateway() -> None:
    result = run("complete", "--target", "127.0.0.1:1", "--connect-timeout", "0.3", "x")
    assert result.exit_code == 3
    assert "not ready within 0.3 s" in result.stderr


def test_what_was_streamed_stays_when_the_stream_breaks(target: str, behaviour: Behaviour) -> None:
    def breaks(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield STREAM(deltas=[gateway_pb2.TextDelta(text="unfinished text")])
        context.abort(grpc.StatusCode.UNAVAILABLE, "engine lost")

    behaviour.stream = breaks
    result = run("complete", "--target", target, "x")
    assert result.stdout == "unfinished text\n"
    assert result.exit_code == 3


def test_count_models_health_version(target: str, behaviour: Behaviour) -> None:
    assert run("count", "--target", target, "text").stdout == "11\n"
    assert run("count", "--target", target, "--chat", "--json", "x").stdout == (
        '{"num_tokens": 11}\n'
    )
    assert behaviour.arrivals[-1].request.conversation.messages[0].role == "user"
    listed = run("models", "--target", target)
    assert listed.stdout.startswith("first\n")
    assert "second" in listed.stdout
    models = json.loads(run("models", "--target", target, "--json").stdout)
    assert [model["id"] for model in models] == ["first", "second"]
    healthy = run("health", "--target", target)
    assert (healthy.stdout, healthy.exit_code) == ("SERVING\n", 0)
    assert run("health", "--target", target, "--service", "x").exit_code == 3
    assert run("health", "--target", "127.0.0.1:1").stdout == "UNAVAILABLE\n"
    assert set(json.loads(run("version", "--json").stdout)) == {"nanoinfer", "python", "grpcio"}
    assert "grpcio" in run("version").stdout


def test_models_shows_defaults(target: str, behaviour: Behaviour) -> None:
    model = generation_pb2.ModelInfo(
        id="m",
        architecture="llama",
        num_parameters=12_600_000,
        default_sampling=generation_pb2.SamplingParams(temperature=0, top_p=0.9),
        features=[generation_pb2.FEATURE_LOGPROBS],
    )
    behaviour.unary = lambda request, context: gateway_pb2.GatewayServiceListModelsResponse(
        models=[model]
    )
    shown = run("models", "--target", target).stdout
    assert "llama, 12.6 M parameters" in shown
    assert "temperature=0 top_p=0.9" in shown
    assert "features  logprobs" in shown


def test_health_of_a_server_that_is_not_ready(behaviour: Behaviour) -> None:
    with running_gateway(behaviour, serving=False) as (address, _):
        result = run("health", "--target", address)
        refused = run("complete", "--target", address, "--connect-timeout", "0.3", "x")
    assert (result.stdout, result.exit_code) == ("NOT_SERVING\n", 3)
    assert refused.exit_code == 3
    assert "not ready within 0.3 s (NOT_SERVING)" in refused.stderr


def test_standard_input_may_be_closed(target: str) -> None:
    command = " ".join([*NANOINFER, "complete", "--target", target])
    answered = run_process(["sh", "-c", f"{command} x <&-"])
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout == "Hello, world\n"
    unanswered = run_process(["sh", "-c", f"{command} <&-"])
    assert unanswered.returncode == 2
    assert "no prompt" in unanswered.stderr


def test_a_reader_that_leaves_is_no_traceback(target: str, behaviour: Behaviour) -> None:
    behaviour.stream = endless
    command = " ".join([*NANOINFER, "complete", "--target", target, "x"])
    result = run_process(["sh", "-c", f"{command} | head -c 3"])
    assert result.stdout == "wor"
    assert "Traceback" not in result.stderr
    assert behaviour.cancelled.wait(60)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Children heed SIGINT, also where a shell in the background has us ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_cancels_and_ends_with_130(target: str, behaviour: Behaviour) -> None:
    behaviour.stream = endless
    with subprocess.Popen(
        [*NANOINFER, "complete", "--target", target, "x"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "word"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert behaviour.cancelled.wait(60)


def test_a_conversation_on_a_terminal(target: str, behaviour: Behaviour) -> None:
    """Two turns, a refused one that is forgotten, and the end of input."""

    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if request.messages[-1].content[0].text == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
        kind = gateway_pb2.GatewayServiceChatStreamResponse
        text = f"answer {len(request.messages)}\x1b[31m"
        yield kind(deltas=[gateway_pb2.TextDelta(text=text)])
        yield kind(finishes=[finish()], summary=SUMMARY)

    behaviour.stream = answer
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*NANOINFER, "chat", "--target", target, "--system", "S"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        terminal = Terminal(ours)
        for line, expected in (
            ("one", "answer 2"),
            ("bad", "refused"),
            ("two", "answer 4"),
            ("/clear", "/clear"),
            ("three", "answer 2"),
        ):
            terminal.expect("> ")
            os.write(ours, f"{line}\n".encode())
            terminal.expect(expected)
        os.write(ours, b"\n/exit\n")
        assert process.wait(60) == 0
    os.close(ours)
    assert "\x1b[31m" not in terminal.shown
    turns = [arrival for arrival in behaviour.arrivals if arrival.method == "ChatStream"]
    roles = [[m.role for m in turn.request.messages] for turn in turns]
    assert roles[2] == ["system", "user", "assistant", "user"]
    assert roles[3] == ["system", "user"]


class Terminal:
    """The reader's side of a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self.shown = ""
        self._descriptor = descriptor
        self._cursor = 0

    def expect(self, text: str) -> None:
        """Reads on until the text has come after what was expected before."""
        while (found := self.shown.find(text, self._cursor)) < 0:
            ready, _, _ = select.select([self._descriptor], [], [], 15)
            assert ready, f"{text!r} did not come: {self.shown!r}"
            self.shown += os.read(self._descriptor, 1024).decode()
        self._cursor = found + len(text)


def test_without_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from nanoinfer.cli import main; main()"
    result = run_process([sys.executable, "-c", code])
    assert result.returncode == 1
    assert result.stderr == (
        "nanoinfer: the command line needs an extra: pip install 'nanoinfer[cli]'\n"
    )


def test_serve_names_a_missing_extra() -> None:
    code = (
        "import sys; sys.modules['tiktoken'] = None; sys.argv = ['x', 'serve', 'tokenizer'];"
        "from nanoinfer.cli import main; main()"
    )
    result = run_process([sys.executable, "-c", code])
    assert result.returncode == 1
    assert "pip install 'nanoinfer[tokenizer]'" in result.stderr


def test_serve_passes_flags_on() -> None:
    result = run_process([*NANOINFER, "serve", "tokenizer", "--help"])
    assert result.returncode == 0, result.stderr
    assert "--port-file" in result.stdout
