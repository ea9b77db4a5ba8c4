"""A nanoGPT checkpoint brings no tokenizer: `--tokenizer` beside it makes it a text service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import tiny_checkpoints
from tests.tokenizer.tiny_tokenizers import make_tokenizer

NANOINFER = Path(sys.executable).parent / "nanoinfer"


def test_a_pt_file_and_a_tokenizer_complete_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_checkpoints, "VOCAB_SIZE", 700)
    checkpoint = tiny_checkpoints.make_checkpoint("nanogpt", tmp_path)
    tokenizer = make_tokenizer(tmp_path / "tokenizer", "gpt2", vocab_size=600)
    command = ["trace", "--raw", "--model", str(checkpoint), "--tokenizer", str(tokenizer)]
    result = subprocess.run(
        [str(NANOINFER), *command, "--max-tokens", "8", "--ignore-eos", "the cache"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "output_tokens=8" in result.stdout
    assert "TokenizerService/Encode" in result.stdout
