"""The real tokenizers and the real model are what their names say."""

import json

import pytest
from tokenizers import Tokenizer

from tests.real import TOKENIZERS, real_model, real_tokenizer

# What each family's publisher states.
SIZES = {
    "qwen3": 151_669,
    "llama3_1": 128_256,
    "llama2": 32_000,
    "gemma3": 262_145,
    "deepseek_v3": 128_815,
    "gptoss": 200_019,
    "smollm2": 49_152,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers_have_their_publishers_sizes(name: str) -> None:
    tokenizer = Tokenizer.from_file(str(real_tokenizer(name) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SIZES[name]


def test_the_real_model_is_smollm2() -> None:
    directory = real_model()
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("llama", 576)
    assert "SmolLM" in (directory / "chat_template.jinja").read_text()
