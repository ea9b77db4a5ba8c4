"""EOS is the union of what configurations and tokenizer name, whichever of them is alone."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from nanoinfer_common.eos import eos_token_ids

TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<|endoftext|>": 2}, "merges": []},
    "added_tokens": [
        {"id": 2, "content": "<|endoftext|>", "special": True},
        {"id": 3, "content": "<|im_end|>", "special": True},
        {"id": 4, "content": "<end_of_turn>", "special": False},
    ],
}


def write(directory: Path, **files: Any) -> Path:
    """JSON files by name without suffix, besides the tokenizer."""
    directory.mkdir(exist_ok=True)
    for name, content in {"tokenizer": TOKENIZER, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [7, 2]}}, (2, 7)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": 7}}, (5, 7)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": None}}, (5,)),
        # a chat model whose configuration still names the base model's end of text
        ({"config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "<|im_end|>"}}, (2, 3)),
        (
            {
                "generation_config": {"eos_token_id": 2},
                "tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
            },
            (2, 3),
        ),
        ({"tokenizer_config": {"eos_token": "<end_of_turn>"}}, (4,)),
        ({"tokenizer_config": {"eos_token": "a"}}, (0,)),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}}, (3,)),
        (
            {
                "special_tokens_map": {"eos_token": {"content": "<|endoftext|>"}},
                "tokenizer_config": {"eos_token": "<|im_end|>"},
            },
            (2, 3),
        ),
        ({"tokenizer_config": {"eos_token": "<unheard>"}}, ()),
        ({"tokenizer_config": {"eos_token": None}}, ()),
    ],
)
def test_every_file_that_names_an_end_counts(
    files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert eos_token_ids(write(tmp_path / "model", **files)) == expected


def test_a_tokenizer_elsewhere_goes_with_the_models_own_configurations(tmp_path: Path) -> None:
    model = write(tmp_path / "model", config={"eos_token_id": 9})
    other = write(
        tmp_path / "other",
        config={"eos_token_id": 5},
        tokenizer_config={"eos_token": "<|im_end|>"},
    )
    assert eos_token_ids(model, other) == (3, 9)
    assert eos_token_ids(model, other / "tokenizer.json") == (3, 9)
    assert eos_token_ids(model) == (9,)
    checkpoint = tmp_path / "model" / "ckpt.pt"
    checkpoint.write_bytes(b"")
    # config.json beside a .pt file belongs to something else
    assert eos_token_ids(checkpoint) == ()
    assert eos_token_ids(checkpoint, other) == (3,)


def test_unigram_and_rank_files(tmp_path: Path) -> None:
    vocabulary = [["<unk>", 0.0], ["</s>", 0.0]]
    tokenizer = {"model": {"type": "Unigram", "vocab": vocabulary}, "added_tokens": None}
    named = {"eos_token": "</s>"}
    assert eos_token_ids(write(tmp_path, tokenizer=tokenizer, tokenizer_config=named)) == (1,)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "x.tiktoken").write_text(f"{base64.b64encode(b'a').decode()} 0\n")
    assert eos_token_ids(tmp_path) == ()
    added = {"added_tokens_decoder": {"7": {"content": "</s>"}}, **named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    assert eos_token_ids(tmp_path) == (7,)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config": {"eos_token_id": "</s>"}}, r"config\.json: eos_token_id is </s>"),
        ({"config": {"eos_token_id": -1}}, r"config\.json: eos_token_id is -1"),
        ({"generation_config": {"eos_token_id": [2, True]}}, r"generation_config\.json"),
        ({"tokenizer_config": {"eos_token": 5}}, r"tokenizer_config\.json: eos_token is 5"),
        ({"config": []}, r"config\.json is not a JSON object"),
        ({"tokenizer": {}, "tokenizer_config": {"eos_token": "a"}}, r"tokenizer\.json is not a"),
    ],
)
def test_nonsense_is_refused_by_the_files_name(
    files: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        eos_token_ids(write(tmp_path / "model", **files))
