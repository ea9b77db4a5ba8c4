"""The start-up benchmark, on a shape that any machine runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from nanoinfer_engine.core.config import ModelConfig
from nanoinfer_engine.models.model_config import read_huggingface_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def startup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import startup

    return startup


@pytest.fixture
def shapes(startup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModelConfig]:
    import random_weights

    monkeypatch.setattr(random_weights, "SHAPES", dict(random_weights.SHAPES))
    return random_weights.SHAPES


@pytest.mark.parametrize("shape", ["0.6b", "8b", "tiny"])
def test_the_reader_finds_the_same_architecture(
    startup: ModuleType, shapes: dict[str, ModelConfig], shape: str, tmp_path: Path
) -> None:
    config = shapes[shape]
    (tmp_path / "config.json").write_text(json.dumps(startup.config_json(config)))
    assert read_huggingface_config(tmp_path) == config


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_a_checkpoint(
    startup: ModuleType, shapes: dict[str, ModelConfig], tied: bool, tmp_path: Path
) -> None:
    shapes["tied" if tied else "tiny"] = replace(shapes["tiny"], tie_word_embeddings=tied)
    startup.write_checkpoint("tied" if tied else "tiny", tmp_path, "cpu", shard_bytes=100_000)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 110_000 for file in files)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.tie_word_embeddings == tied


def test_two_starts_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--shape", "tiny", "--device", "cpu", "--directory", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "startup.py"), *options, "--out", str(out)]
    subprocess.run(command, check=True, timeout=150, stdout=subprocess.DEVNULL)
    cold, warm = (json.loads(line) for line in out.read_text().splitlines())
    assert (cold["kernels"], warm["kernels"]) == ("cold", "warm")
    for line in (cold, warm):
        parts = ("import_s", "load_s", "size_cache_s", "tune_and_capture_s")
        assert 0 < sum(line[part] for part in parts) < line["total_s"]
        assert line["gb_per_s"] > 0
    assert list(tmp_path.iterdir()) == [out]
