"""The number format: the operator's, or on a CUDA device the checkpoint's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nanoinfer_engine.core.config import CheckpointError
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from nanoinfer_engine.weights.number_formats import DTYPES, choose_dtype, stored_format
from safetensors.torch import load_file, save_file

from tests.engine.compute.driver import make_runner
from tests.engine.tiny_checkpoints import make_checkpoint

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def qwen2(tmp_path: Path) -> Path:
    return make_checkpoint("qwen2", tmp_path / "model")


def store(directory: Path, dtype: torch.dtype) -> Path:
    """Matrices in `dtype`; vectors, such as norms, in float32."""
    file = directory / "model.safetensors"
    tensors = {n: t.to(dtype) if t.ndim > 1 else t.float() for n, t in load_file(file).items()}
    save_file(tensors, file)
    return directory


@pytest.mark.parametrize(
    ("stored", "with_bfloat16", "without"),
    [
        (torch.bfloat16, "bfloat16", "float32"),
        (torch.float16, "float16", "float16"),
        (torch.float32, "bfloat16", "float16"),
        (torch.float64, "bfloat16", "float16"),
    ],
)
def test_on_cuda_auto_follows_the_checkpoint(
    stored: torch.dtype,
    with_bfloat16: str,
    without: str,
    qwen2: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(store(qwen2, stored))
    assert stored_format(checkpoint) == stored
    for supported, expected in ((True, with_bfloat16), (False, without)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda yes=supported, **_: yes, raising=True
        )
        assert choose_dtype("auto", checkpoint, CUDA) == expected
        assert choose_dtype("auto", checkpoint, CPU) == "float32"
        for name in DTYPES:
            assert choose_dtype(name, checkpoint, CUDA) == name


def test_a_pt_file_has_a_format_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint("nanogpt", tmp_path))
    assert stored_format(checkpoint) == torch.float32


def test_weights_that_are_no_floats_and_unknown_names_are_refused(qwen2: Path) -> None:
    checkpoint = open_checkpoint(qwen2)
    with pytest.raises(ValueError, match="dtype 'int4' is not one of auto, float32"):
        choose_dtype("int4", checkpoint, CPU)
    quantised = open_checkpoint(store(qwen2, torch.int8))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: dtype I8"):
        choose_dtype("auto", quantised, CUDA)


def test_the_runner_tells_what_it_computes_in(qwen2: Path) -> None:
    assert make_runner(store(qwen2, torch.bfloat16), dtype="auto").number_format == "float32"
    assert make_runner(qwen2, dtype="bfloat16").number_format == "bfloat16"
    eight = make_runner(qwen2, dtype="auto", quantization="fp8", kv_cache_dtype="fp8")
    assert eight.number_format == "float32+fp8+kv_fp8"
