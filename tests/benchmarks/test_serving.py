"""The serving benchmark over a real stack: every stream is kept up, whoever shares them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.fakes import GREEDY

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """In place of `time`: goes on when somebody looks or sleeps."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clients", "gateways", "tokens", "model"),
    [
        (1, 1, 8, ["--model", "models/guide"]),
        (2, 2, 8, ["--model", "models/guide"]),
        (1, 1, 128, ["--shape", "0.6b", "--device", "timed"]),
    ],
)
def test_all_tokens_of_all_streams_are_counted(
    clients: int, gateways: int, tokens: int, model: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "benchmarks/serving.py", *model, "--out", str(out)]
    command += ["--streams", "1", "3", "--requests", "2", "--max-tokens", str(tokens)]
    command += ["--clients", str(clients), "--gateways", str(gateways)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["path"], row["streams"], row["requests"]) for row in rows] == [
        ("gateway", 1, 2),
        ("engine", 1, 2),
        ("gateway", 3, 6),
        ("engine", 3, 6),
    ]
    for row in rows:
        assert (row["clients"], row["gateways"]) == (clients, gateways)
        # of a stream's tokens, not of its messages
        rate = row["streams"] * 1e3 * tokens
        rate /= row["ttft_p50_ms"] + (tokens - 1) * row["tpot_p50_ms"]
        assert 0.3 * rate < row["tok_s"] < 3 * rate
        assert set(row["cores"]) == {"gateway", "engine", "tokenizer", "clients"}
        assert row["cores"]["engine"] > 0


def test_a_share_that_fails_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grpc
    from launch import Running
    from load import Target, measure

    nobody = Target("engine", [[1, 2]], 4, {"engine": [Running("127.0.0.1:1", os.getpid())]})
    with pytest.raises(grpc.aio.AioRpcError):
        measure(nobody, num_streams=2, num_requests=1, num_clients=2)


def test_steps_of_a_timed_device_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import timed_engine
    from nanoinfer_engine.core.batch import Batch, BatchRow
    from nanoinfer_engine.core.config import EngineConfig

    clock = Clock()
    monkeypatch.setattr(timed_engine, "time", clock)
    runner = timed_engine.TimedRunner(EngineConfig(Path("none")))
    prompt = BatchRow(tuple(range(100_000)), 0, (), samples=False, sampling=GREEDY)
    decodes = [BatchRow((1,), 7, (), samples=True, sampling=GREEDY)] * 10
    long = runner.launch(Batch((prompt, *decodes)))
    short = runner.launch(Batch(tuple(decodes)))
    assert short.results() == [(timed_engine.TOKEN,)] * 10
    launched = 0.3e-3 + 11 * 6e-6
    assert clock.now == pytest.approx(launched + long.timing().busy + short.timing().busy, abs=1e-4)
    assert long.results() == [(), *[(timed_engine.TOKEN,)] * 10]
    assert long.timing().busy == pytest.approx(0.8e-3 + 10 * 21e-6 + 100_000 * 1.6e-6)
    assert short.timing().busy == pytest.approx(0.8e-3 + 10 * 21e-6)
    assert short.timing().idle == 0  # it was launched while the long one ran
