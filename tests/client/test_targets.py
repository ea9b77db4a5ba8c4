"""Targets that cannot be meant are refused with what to write instead."""

from __future__ import annotations

import nanoinfer
import pytest
from nanoinfer.cli.app import app
from nanoinfer.targets import check_target
from typer.testing import CliRunner

WRONG = [
    ("http://localhost:50051", "write localhost:50051"),
    ("https://api.example.com", "write api.example.com:50051 (TLS: "),
    ("HTTP://user:word@host:1/path?query", "write host:1"),
    ("grpc://localhost:7", "write localhost:7"),
    ("grpcs://host", "write host:50051 (TLS: "),
    ("tcp://host:3", "write host:3"),
    ("dns:///http://host:1", "write host:1"),
    ("localhost", "no port: write localhost:50051"),
    ("localhost:", "no port: write localhost:50051"),
    ("dns:///host", "no port: write host:50051"),
    ("[::1]", "no port: write [::1]:50051"),
    ("::1:50051", "brackets, such as [::1]:50051"),
    ("[::1:50051", "brackets, such as [::1]:50051"),
    ("host:1:2", "a target is HOST:PORT"),
    ("host:1/path", "has a path"),
    (":50051", "no host: write 127.0.0.1:50051"),
    ("host:0", "from 1 to 65535"),
    ("host:65536", "from 1 to 65535"),
    ("host:grpc", "from 1 to 65535"),
    ("host:\N{ARABIC-INDIC DIGIT THREE}", "from 1 to 65535"),
    (" host:1", "blanks"),
    ("host:1\n", "blanks or control characters"),
    ("", "target is empty"),
]


@pytest.mark.parametrize(("target", "told"), WRONG)
def test_the_clients_say_what_to_write(target: str, told: str) -> None:
    for kind in (nanoinfer.Client, nanoinfer.AsyncClient):
        with pytest.raises(ValueError, match="target") as caught:
            kind(target)
        assert told in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:50051",
        "localhost:1",
        "api.example.com:443",
        "[::1]:50051",
        "[fe80::1%eth0]:50051",
        "dns:///host:50051",
        "dns:host:50051",
        "dns://8.8.8.8/host:50051",
        "ipv4:10.0.0.1:50051,10.0.0.2:50051",
        "ipv6:[::1]:50051",
        "unix:/run/nanoinfer.sock",
        "unix:///run/nanoinfer.sock",
        "xds:///gateway",
    ],
)
def test_what_grpc_resolves_is_let_through(target: str) -> None:
    check_target(target)
    with nanoinfer.Client(target) as client:
        assert client.target == target


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "--target", "http://localhost:50051", "x"],
        ["complete", "--target", "http://localhost:50051", "x"],
        ["count", "--target", "http://localhost:50051", "x"],
        ["models", "--target", "http://localhost:50051"],
        ["health", "--target", "http://localhost:50051"],
        ["trace", "--target", "http://localhost:50051", "x"],
        ["trace", "--target", "127.0.0.1:1", "--collector", "http://localhost:50051", "x"],
    ],
)
def test_every_verb_makes_a_usage_error_of_it(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "write localhost:50051" in result.stderr


def test_the_variable_is_held_to_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOINFER_TARGET", "https://host")
    result = CliRunner().invoke(app, ["models"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "write host:50051" in result.stderr
