"""The command line's chat samples gently where the checkpoint states nothing, and says so."""

from __future__ import annotations

from typing import Any

import pytest
from nanoinfer.cli import console
from nanoinfer.cli.answers import converse
from nanoinfer.cli.app import app
from nanoinfer.client import Client
from nanoinfer.v1.generation_pb2 import ModelInfo, SamplingParams
from typer.testing import CliRunner

from tests.client.fake_gateway import Behaviour

SERVERS_OWN = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}


def model(**stated: float) -> ModelInfo:
    """A model whose checkpoint states these values; the others are the server's own."""
    values: Any = {**SERVERS_OWN, **stated}
    named: Any = stated
    return ModelInfo(
        default_sampling=SamplingParams(**values), stated_sampling=SamplingParams(**named)
    )


def chat(target: str, *flags: str) -> Any:
    return CliRunner().invoke(app, ["chat", "--target", target, *flags, "Hi"])


def sent(behaviour: Behaviour) -> dict[str, float]:
    """The sampling fields of the last request."""
    fields = behaviour.arrivals[-1].request.options.sampling.ListFields()
    return {field.name: pytest.approx(value) for field, value in fields}


GENTLE = {"temperature": 0.7, "top_p": 0.9}


@pytest.mark.parametrize(
    ("stated", "flags", "expected"),
    [
        ({}, [], GENTLE),
        ({"repetition_penalty": 1.1}, [], GENTLE),
        ({"temperature": 1.0}, [], {}),
        ({"temperature": 0.0}, [], {}),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, [], {}),
        ({"top_k": 40}, [], {"temperature": 0.7}),
        ({"min_p": 0.05}, [], {"temperature": 0.7}),
        ({"temperature": 0.6}, ["--temperature", "1.2"], {"temperature": 1.2}),
        ({}, ["--temperature", "1"], {"temperature": 1.0, "top_p": 0.9}),
        ({}, ["--temperature", "0"], {"temperature": 0.0}),
        ({}, ["--top-p", "0.5"], {"temperature": 0.7, "top_p": 0.5}),
        ({}, ["--top-k", "0"], {"temperature": 0.7, "top_k": 0}),
        ({}, ["--temperature", "1", "--top-p", "1"], {"temperature": 1.0, "top_p": 1.0}),
    ],
)
def test_flags_come_before_the_checkpoint_and_the_checkpoint_before_the_chat(
    target: str,
    behaviour: Behaviour,
    stated: dict[str, float],
    flags: list[str],
    expected: dict[str, float],
) -> None:
    behaviour.model = model(**stated)
    result = chat(target, *flags)
    assert result.exit_code == 0, result.output
    assert sent(behaviour) == expected
    assert result.stdout == "Hello, world\n"


def test_a_server_that_does_not_tell_them_apart_keeps_its_defaults(
    target: str, behaviour: Behaviour
) -> None:
    behaviour.model = ModelInfo(default_sampling=SamplingParams(temperature=0.6))
    result = chat(target)
    assert sent(behaviour) == {}
    assert "sampling" not in result.stderr


def test_what_the_chat_adds_is_told_with_the_flags_that_change_it(
    target: str, behaviour: Behaviour
) -> None:
    behaviour.model = model(repetition_penalty=1.25)
    told = "sampling: temperature=0.7 top_p=0.9 repetition_penalty=1.25 (the model states none;"
    assert f"{told} change it with --temperature and --top-p)" in chat(target).stderr
    only = chat(target, "--temperature", "1.5").stderr
    assert "temperature=1.5 top_p=0.9" in only
    assert "change it with --top-p)" in only
    assert "sampling" not in chat(target, "--temperature", "1", "--top-p", "0.8").stderr


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({}, "sampling: temperature=0.7 top_p=0.9 (the model states none;"),
        ({"temperature": 0.6, "top_k": 20}, "sampling: temperature=0.6 top_k=20\n"),
    ],
)
def test_a_conversation_begins_with_how_it_samples(
    client: Client,
    behaviour: Behaviour,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stated: dict[str, float],
    told: str,
) -> None:
    behaviour.model = model(**stated)
    lines = iter(["Hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    converse(client, None, {}, as_json=False)
    assert capsys.readouterr().err.startswith(told)
    assert sent(behaviour) == ({} if stated else GENTLE)


def test_the_model_is_asked_for_with_the_requests_own_metadata(
    target: str, behaviour: Behaviour
) -> None:
    flags = ["--model", "m", "--tenant", "t", "--metadata", "x-own=1", "--timeout", "7"]
    assert chat(target, *flags, "--request-id", "r").exit_code == 0
    asked, answered = behaviour.arrivals
    assert (asked.method, asked.request.model) == ("GetModelInfo", "m")
    assert asked.metadata["x-nanoinfer-tenant"] == "t"
    assert asked.metadata["x-own"] == "1"
    assert asked.seconds_left == pytest.approx(7, abs=5)
    assert asked.metadata["x-request-id"] != answered.metadata["x-request-id"] == "r"


def test_a_raw_prompt_keeps_the_contracts_defaults(target: str, behaviour: Behaviour) -> None:
    behaviour.model = model()
    result = CliRunner().invoke(app, ["complete", "--target", target, "Hi"])
    assert result.exit_code == 0
    assert sent(behaviour) == {}
    assert [arrival.method for arrival in behaviour.arrivals] == ["GenerateStream"]


def test_without_standard_error_nothing_is_written_into_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    console.note("a note")
    assert capsys.readouterr().out == ""
