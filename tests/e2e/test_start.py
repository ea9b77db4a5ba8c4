"""What a service says where it cannot start: one clear line, no traceback, a code that is not 0."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import GUIDE
from tests.engine.tiny_checkpoints import make_checkpoint


def start(module: str, model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", module, "--port", "0", "--metrics-port", "0"),
            *("--model", str(model), *flags),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("module", ["nanoinfer_engine", "nanoinfer_tokenizer"])
def test_a_model_that_is_not_there(module: str, tmp_path: Path) -> None:
    result = start(module, tmp_path / "nothing")
    assert result.returncode == 1
    assert "nothing" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model/model.gguf": "GGUF"}, "GGUF is not supported: give the directory"),
        ({"model/adapter_config.json": "{}"}, "a LoRA adapter without its base model"),
        ({"model/config.json": "{}", "model/pytorch_model.bin": ""}, "save_pretrained(DIRECTORY)"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_both_services_in_the_same_words(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for module in ("nanoinfer_engine", "nanoinfer_tokenizer"):
        result = start(module, tmp_path / "model")
        assert result.returncode == 1
        assert said in result.stderr + result.stdout
        assert "Traceback" not in result.stderr + result.stdout


def test_a_checkpoint_without_a_tokenizer_says_how_to_name_one(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("nanogpt", tmp_path)
    result = start("nanoinfer_tokenizer", checkpoint)
    assert result.returncode == 1
    assert "name one by --tokenizer" in result.stderr + result.stdout


@pytest.mark.matrix("R78")
def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    model = Path(shutil.copytree(GUIDE, tmp_path / "model", ignore=shutil.ignore_patterns("facts")))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    result = start("nanoinfer_engine", model)
    assert result.returncode == 1
    assert "model.safetensors" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    document = json.loads((GUIDE / "tokenizer.json").read_text())
    del document["model"]["merges"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    result = start("nanoinfer_tokenizer", tmp_path)
    assert result.returncode == 1
    assert f"tokenizer of {tmp_path}" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout


def test_a_device_that_is_not_there() -> None:
    result = start("nanoinfer_engine", GUIDE, "--device", "cuda:7")
    assert result.returncode == 1
    assert "cuda:7" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout
