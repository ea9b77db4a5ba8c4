"""Settings, the checkpoint's sampling defaults, and the process itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

import pytest
from nanoinfer_common.config import parse_settings
from nanoinfer_engine.core.config import CheckpointError, EngineConfig
from nanoinfer_engine.core.settings import flag_of, setting_of
from nanoinfer_engine.core.watchdog import Patience
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_engine.weights.generation_config import SamplingDefaults, read_sampling_defaults

PORTS = ["--port", "0", "--metrics-port", "none"]


def parse(*arguments: str) -> EngineSettings:
    return parse_settings(EngineSettings, list(arguments), "nanoinfer-engine")


def test_flags_become_the_core_configuration(tmp_path: Path) -> None:
    flags = "--port 0 --threads 2 --kv-cache-memory 64MiB --max-batch-tokens 128 --block-size 8"
    settings = parse("--model", str(tmp_path), "--dtype", "bfloat16", *flags.split())
    config = settings.engine_config()
    assert config.model_path == tmp_path
    assert (config.num_threads, config.kv_cache_bytes) == (2, 64 * 1024**2)
    assert (config.max_batch_tokens, config.block_size, config.dtype) == (128, 8, "bfloat16")
    assert (config.prefix_caching, config.max_queue_seconds) == (True, None)
    flags = "--no-prefix-caching --max-queue-seconds 7 --max-waiting-bytes 2MiB"
    config = parse("--model", "a", *flags.split()).engine_config()
    assert (config.prefix_caching, config.max_queue_seconds) == (False, 7)
    assert config.max_waiting_bytes == 2 * 1024**2
    assert (config.quantization, config.kv_cache_dtype) == ("none", "auto")
    flags = "--quantization fp8 --kv-cache-dtype fp8"
    config = parse("--model", "a", *flags.split()).engine_config()
    assert (config.quantization, config.kv_cache_dtype) == ("fp8", "fp8")
    assert config.number_format == "auto+fp8+kv_fp8"
    assert config.tensor_parallel == 1
    assert parse("--model", "a", "--tensor-parallel", "2").engine_config().tensor_parallel == 2
    assert settings.served_name == tmp_path.name
    assert parse("--model", "a/b.pt").served_name == "b"
    (tmp_path / "Llama-3.1-8B-Instruct").mkdir()
    whole = parse("--model", str(tmp_path / "Llama-3.1-8B-Instruct"))
    assert whole.served_name == "Llama-3.1-8B-Instruct"
    assert parse("--model", "a", "--model-name", "x").served_name == "x"


def another_value(declared: Field[Any]) -> Any:
    """A value within the bounds that is no default of the field's."""
    described = setting_of(declared)
    if isinstance(declared.default, bool):
        return not declared.default
    if described.choices:
        return next(choice for choice in described.choices if choice != declared.default)
    if declared.default is MISSING or isinstance(declared.default, str):
        return {"model": Path("another"), "device": "cuda"}[flag_of(declared)]
    if described.gt is not None and described.le is not None:
        return described.le
    # above what a step's rows need at least, of tokens that a step has at most
    return 257 if described.le is None or described.le > 257 else described.le


def flags(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return (
        [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [flag, f"{value}"]
    )


def values_in_the_core(*arguments: str) -> dict[str, Any]:
    settings = parse("--model", "a", *arguments)
    return asdict(settings.engine_config()) | asdict(settings.patience())


@pytest.mark.parametrize("declared", [*fields(EngineConfig), *fields(Patience)], ids=flag_of)
def test_each_field_of_the_core_is_a_flag_that_arrives_there(declared: Field[Any]) -> None:
    name, value = flag_of(declared), another_value(declared)
    assert setting_of(declared).help == EngineSettings.model_fields[name].description
    assert values_in_the_core(*flags(name, value))[declared.name] == value
    assert values_in_the_core()[declared.name] != value


def test_the_core_built_directly_has_the_defaults_of_the_service() -> None:
    assert parse("--model", "a").engine_config() == EngineConfig(Path("a"))
    assert parse("--model", "a").patience() == Patience()


def test_defaults_follow_the_device() -> None:
    def of(*flags: str) -> dict[str, Any]:
        config = parse("--model", "a", "--device", "cuda:1", *flags).engine_config()
        followed = [f.name for f in fields(config) if setting_of(f).follows_device]
        return {name: getattr(config, name) for name in followed}

    assert of() == {
        "kv_cache_bytes": None,
        "max_batch_tokens": 8192,
        "max_batch_requests": 256,
        "max_mixed_tokens": 2048,
    }
    given = of(
        "--kv-cache-memory", "1GiB", "--max-batch-requests", "32", "--max-mixed-tokens", "99"
    )
    assert (given["kv_cache_bytes"], given["max_batch_requests"]) == (1024**3, 32)
    assert given["max_mixed_tokens"] == 99


def test_what_streams_leave_to_prompts_follows_the_device() -> None:
    def mixed(*flags: str) -> int:
        return parse("--model", "a", *flags).engine_config().mixed_step_tokens

    assert mixed() == 512
    assert mixed("--max-mixed-tokens", "100") == 100
    assert mixed("--device", "cuda") == 2048
    assert mixed("--device", "cuda", "--max-batch-tokens", "1024") == 1024
    assert mixed("--device", "cuda", "--max-batch-requests", "4096") == 4096
    assert mixed("--device", "cuda", "--max-mixed-tokens", "8192") == 8192


def test_float16_is_refused_on_a_cpu_alone(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "a", "--dtype", "float16"]
    assert parse(*flags, "--device", "cuda").engine_config().dtype == "float16"
    assert parse("--model", "a", "--dtype", "bfloat16").engine_config().dtype == "bfloat16"
    with pytest.raises(SystemExit):
        parse(*flags)
    assert "float16 is slow on a CPU: leave it at auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "a", "--kv-cache-memory", "lots"],
        ["--model", "a", "--kv-cache-memory", "0"],
        ["--model", "a", "--threads", "0"],
        ["--model", "a", "--tensor-parallel", "0"],
        ["--model", "a", "--max-queue-seconds", "0"],
        ["--model", "a", "--max-waiting-bytes", "0"],
        ["--model", "a", "--dtype", "int3"],
        ["--model", "a", "--dtype", "float16"],
        ["--model", "a", "--quantization", "int3"],
        ["--model", "a", "--kv-cache-dtype", "float16"],
        ["--model", "a", "--max-batch-tokens", "8", "--max-batch-requests", "9"],
        ["--model", "a", "--max-mixed-tokens", "63"],
        ["--model", "a", "--max-mixed-tokens", "0"],
        ["--model", "a", "--max-mixed-tokens", "513"],
        ["--model", "a", "--tensor-parallel", "2", "--device", "cuda:1"],
        ["--model", "a", "--max-model-len", "1"],
        ["--model", "a", "--no-such-flag", "1"],
    ],
)
def test_an_invalid_setting_ends_the_start(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", SamplingDefaults()),
        ('{"do_sample": false, "temperature": 0.6}', SamplingDefaults(temperature=0.0)),
        ('{"do_sample": true, "temperature": 0.5, "top_k": 20}', SamplingDefaults(0.5, 1.0, 20)),
        ('{"top_p": 0.75, "min_p": null}', SamplingDefaults(1.0, 0.75)),
        ('{"top_k": -1}', SamplingDefaults()),
        ('{"top_k": 50.0}', SamplingDefaults(top_k=50)),
        ('\ufeff{"top_k": 7}', SamplingDefaults(top_k=7)),
    ],
)
def test_defaults_of_a_checkpoint(tmp_path: Path, text: str, expected: SamplingDefaults) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert read_sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("{}", set()),
        ('{"temperature": null, "eos_token_id": 1}', set()),
        ('{"do_sample": true}', set()),
        ('{"do_sample": false}', {"temperature"}),
        ('{"temperature": 1.0}', {"temperature"}),
        ('{"top_k": 0, "top_p": 1.0, "min_p": 0.0}', {"top_k", "top_p", "min_p"}),
        ('{"repetition_penalty": 1.1}', {"repetition_penalty"}),
    ],
)
def test_what_a_checkpoint_states_is_told_from_what_it_leaves_open(
    tmp_path: Path, text: str, stated: set[str]
) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert read_sampling_defaults(tmp_path).stated == stated


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("{}", ()),
        ('{"temperature": 0.5, "eos_token_id": [1], "max_new_tokens": 9, "do_sample": true}', ()),
        ('{"no_repeat_ngram_size": 0, "bad_words_ids": null, "num_beams": 1}', ()),
        (
            '{"suppress_tokens": [3], "no_repeat_ngram_size": 1, "typical_p": 0.9, "x": {"a": 1}}',
            ("no_repeat_ngram_size", "suppress_tokens", "typical_p", "x"),
        ),
    ],
)
def test_fields_of_a_checkpoint_without_effect_are_named(
    tmp_path: Path, text: str, unread: tuple[str, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert read_sampling_defaults(tmp_path).unread == unread


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"temperature": "hot"}', '{"top_p": 0}', '{"temperature": NaN}']
)
def test_invalid_defaults_refuse_the_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_sampling_defaults(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"temperature": 2.5}', r"temperature is 2\.5; it must be a number in 0 … 2: correct it"),
        ('{"top_p": 1.5}', r"top_p is 1\.5; it must be a number in 1e-06 … 1"),
        ('{"top_k": -2}', "top_k is -2; it must be a number in 0"),
        ('{"top_k": 1.5}', r"top_k is 1\.5; it must be an integer"),
        ('{"repetition_penalty": 12}', "repetition_penalty is 12; it must be a number in 1e-06"),
        ('{"do_sample": "no"}', "do_sample is no; it must be true or false"),
    ],
)
def test_a_default_beyond_our_ranges_says_what_is_taken_and_what_to_do(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_sampling_defaults(tmp_path)


def test_no_file_means_the_contract_defaults(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(1.0, 1.0, 0, 0.0)
    assert read_sampling_defaults(tmp_path).stated == set()


def test_the_process_serves_drains_and_exits(tiny_model: Path, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    flags = ["--model", str(tiny_model), "--port-file", str(port_file), *PORTS]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nanoinfer_engine", *flags, "--kv-cache-memory", "4MiB"],
            stdin=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        end = time.monotonic() + 60
        while b"SERVER_STATE_SERVING" not in (tmp_path / "log").read_bytes():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        assert port_file.read_text().startswith("listening on 127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_broken_checkpoint_exits_with_a_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "nanoinfer_engine", "--model", str(tmp_path), *PORTS],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert b"config.json" in done.stderr
    assert b"Traceback" not in done.stderr
