"""The README's commands, by hand as a user would: without a terminal, standard input closed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.conftest import GUIDE, ROOT
from tests.e2e.stack import Stack

NANOINFER = Path(sys.executable).parent / "nanoinfer"


def run(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(NANOINFER), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_trace_answers_and_draws_the_request(tmp_path: Path) -> None:
    result = run("trace", "--model", str(GUIDE), "What is a KV cache?")
    assert result.returncode == 0, result.stderr
    assert "key" in result.stdout.lower()
    for name in (
        "ChatStream",
        "RenderChat",
        "EngineService/Generate",
        "queue",
        "prefill",
        "decode",
    ):
        assert name in result.stdout, name
    for service in ("gateway", "tokenizer", "engine"):
        assert service in result.stdout, service


def test_chat_and_complete_against_a_running_gateway(stack: Stack) -> None:
    target = ["--target", stack.gateway.address]
    answer = run("chat", *target, "--max-tokens", "48", "What is a KV cache?")
    assert answer.returncode == 0, answer.stderr
    assert "key" in answer.stdout.lower()
    completion = run("complete", *target, "--json", "--temperature", "0", "import os")
    assert completion.returncode == 0, completion.stderr
    assert json.loads(completion.stdout)
    models = run("models", *target, "--json")
    assert "guide" in models.stdout


def test_the_readmes_python_gives_the_readmes_output(stack: Stack) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for code in (first, second):
        assert "127.0.0.1:50051" in code
        program = code.replace("127.0.0.1:50051", stack.gateway.address)
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
        if code is first:
            assert f"```\n{done.stdout}```" in readme


def test_a_refused_request_has_its_own_exit_code(stack: Stack) -> None:
    result = run("chat", "--target", stack.gateway.address, "--top-p", "0", "x")
    assert result.returncode == 4
    assert "top_p" in result.stderr
    assert "Traceback" not in result.stderr


def test_up_serves_where_it_is_told_until_it_is_told_to_stop(tmp_path: Path) -> None:
    own = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    log = tmp_path / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(NANOINFER), "up", "--model", str(GUIDE), "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own, "NANOINFER_HOST": "127.0.0.2"},
        )
    try:
        end = time.monotonic() + 90
        while "is ready at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        (target,) = re.findall(r"ready at (127\.0\.0\.2:\d+)", log.read_text())
        assert run("health", "--target", target).stdout == "SERVING\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()


def test_options_of_the_choice_have_flags(stack: Stack) -> None:
    target = ["--target", stack.gateway.address, "--temperature", "0", "--max-tokens", "8"]
    flags = ["--repetition-penalty", "1.3", "--frequency-penalty", "0.5", "--logprobs", "2"]
    flags += ["--presence-penalty", "0.5", "--logit-bias", "65=-3.5", "--prompt-logprobs", "1"]
    flags += ["--logprob-token-ids", "65", "--echo", "--truncate-prompt-tokens", "9"]
    flags += ["--min-p", "0.05", "--min-tokens", "8", "--ignore-eos"]
    result = run("complete", *target, "--json", *flags, "import os")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    choice = answer["choices"][0]
    assert choice["text"].startswith("import os")
    assert len(choice["logprobs"]) == 8
    assert all(len(entry["top"]) == 3 for entry in choice["logprobs"])
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"] - 1
    shown = run("complete", *target, *flags, "import os")
    assert shown.stdout.startswith("import os")
