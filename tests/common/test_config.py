"""Where settings come from, which wins, and how a bad one ends the start."""

from pathlib import Path

import pytest
import yaml
from nanoinfer_common.config import ServiceSettings, parse_settings
from pydantic import Field, SecretStr, ValidationError


class Settings(ServiceSettings):
    port: int = Field(50099, ge=0, le=65535, description="Port.")
    engines: tuple[str, ...] = Field((), description="Addresses.")
    model: Path | None = Field(None, description="Model directory.")
    token: SecretStr = Field(SecretStr("hidden"), description="A secret, 100 % hidden.")


def parse(*argv: str) -> Settings:
    return parse_settings(Settings, argv, "probe")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    settings = parse()
    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 50099, None)
    assert settings.default_deadline_seconds == 300
    assert settings.max_deadline_seconds == 3600
    assert settings.drain_seconds == 30
    assert settings.trust_incoming_trace is False
    assert settings.metrics_prefix == "vllm:"


def test_flags_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1\nlog_level: error\ndrain_seconds: 5\nengines: [a, b]\n")
    monkeypatch.setenv("NANOINFER_PORT", "2")
    monkeypatch.setenv("NANOINFER_LOG_LEVEL", "warning")
    settings = parse("--config", str(file), "--port", "3")
    assert settings.port == 3
    assert settings.log_level == "warning"
    assert settings.drain_seconds == 5
    assert settings.engines == ("a", "b")
    assert settings.reflection is True
    monkeypatch.setenv("NANOINFER_CONFIG", str(file))
    assert parse().drain_seconds == 5


def test_kinds_of_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse("--no-reflection", "--metrics-port", "0", "--engines", "a,b", "--engines", "c")
    assert settings.reflection is False
    assert settings.metrics_port == 0
    assert settings.engines == ("a", "b", "c")
    assert parse("--metrics-port", "none").metrics_port is None
    monkeypatch.setenv("NANOINFER_ENGINES", "x, y")
    assert parse().engines == ("x", "y")
    monkeypatch.setenv("NANOINFER_ENGINES", '["z"]')
    assert parse().engines == ("z",)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert parse("--config", str(file)) == parse()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--port", "65536"], "--port"),
        (["--port", "-1"], "--port"),
        (["--port", ""], "--port"),
        (["--port", "none"], "--port"),
        (["--log-level", "loud"], "--log-level"),
        (["--default-deadline-seconds", "nan"], "--default-deadline-seconds"),
        (["--max-deadline-seconds", "inf"], "--max-deadline-seconds"),
        (["--drain-seconds", "-1"], "--drain-seconds"),
        (["--metrics-prefix", "a-b"], "--metrics-prefix"),
        (["--max-message-bytes", "1"], "--max-message-bytes"),
        (["--max-deadline-seconds", "10"], "default_deadline_seconds is more than"),
        (["--unknown", "1"], "unrecognized arguments"),
        (["--por", "1"], "unrecognized arguments"),
    ],
)
def test_bad_flags(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, *argv)


def test_bad_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    assert str(file) in refused(capsys, "--config", str(file))  # it does not exist yet
    for content, told in [
        ("port: abc", f"{file}: port"),
        ("prot: 1", "unknown setting prot"),
        ("- 1", "no mapping"),
        ("{", "not YAML"),
    ]:
        file.write_text(content)
        assert told in refused(capsys, "--config", str(file))
    monkeypatch.setenv("NANOINFER_PORT", "")
    assert "NANOINFER_PORT" in refused(capsys)
    monkeypatch.delenv("NANOINFER_PORT")
    monkeypatch.setenv("NANOINFER_ENGINES", "[1,")
    assert "engines" in refused(capsys)


def test_dry_run_prints_everything_but_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--dry-run", "--port", "7")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["port"] == 7
    assert set(yaml.safe_load(printed)) == set(Settings.model_fields)
    assert "hidden" not in printed


def test_help_names_every_flag_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"NANOINFER_{name.upper()}" in text
    assert "100 % hidden" in text


def test_settings_are_frozen_and_closed() -> None:
    settings = ServiceSettings(port=1)
    with pytest.raises(ValidationError):
        settings.port = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        ServiceSettings(prot=1)  # type: ignore[call-arg]
