"""Real tokenizers, a small trained model and real chat templates, for tests of every room.

`make test` fetches the first two (`fetch.sh`, `convert.py`). The chat templates lie in a folder
beside the project, or where CHAT_TEMPLATES says. A test skips by the name of what is not there.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / ".cache" / "real"
TEMPLATES = Path(
    os.environ.get("CHAT_TEMPLATES", ROOT.parent / "shared" / "data" / "chat-templates")
)
TOKENIZERS = ("qwen3", "llama3_1", "llama2", "gemma3", "deepseek_v3", "gptoss", "smollm2")
# The template that belongs to a tokenizer whose files bring none, or a newer one.
TEMPLATE_OF = {"gptoss": "openai-gpt-oss-120b.jinja"}


def real_tokenizer(name: str) -> Path:
    """Gives the directory of a real tokenizer, one of `TOKENIZERS`; skips where it is not there."""
    directory = REAL / name / "model" if name == "smollm2" else REAL / name
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"no real tokenizer {name} here: tests/real/fetch.sh could not fetch it")
    return directory


def real_model() -> Path:
    """Gives the model directory of SmolLM2-135M-Instruct: trained weights, tokenizer, template."""
    directory = REAL / "smollm2" / "model"
    if not (directory / "model.safetensors").is_file():
        pytest.skip("no SmolLM2 here: tests/real/fetch.sh could not fetch it")
    return directory


def chat_template(name: str) -> str:
    """Gives the text of a real chat template, by file name."""
    file = TEMPLATES / name
    if not file.is_file():
        pytest.skip(f"no chat template {name} here: {TEMPLATES} is not there")
    return file.read_text(encoding="utf-8")


def chat_template_names() -> list[str]:
    """Lists the chat templates by file name; one name that skips where there are none."""
    return sorted(file.name for file in TEMPLATES.glob("*.jinja")) or ["none"]
