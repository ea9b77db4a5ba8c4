"""The fingerprint changes with everything that changes ids, and with nothing else."""

import base64
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nanoinfer_common.fingerprint import tokenizer_fingerprint
from nanoinfer_common.json_files import JsonFileError

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 4, "content": "<eos>", "special": True, "normalized": False},
        {"id": 5, "content": "<bos>", "special": True, "normalized": False},
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated"},
    "post_processor": {"type": "ByteLevel", "trim_offsets": True},
    "decoder": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3},
        "merges": ["a b"],
    },
}
CONFIG: dict[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": {"content": "<eos>", "special": True},
    "chat_template": "{{ messages }}",
    "model_max_length": 10,
}


def write(directory: Path, tokenizer: Any = TOKENIZER, config: Any = CONFIG) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def changed(change: Callable[[Any, Any], object]) -> tuple[Any, Any]:
    tokenizer, config = copy.deepcopy(TOKENIZER), copy.deepcopy(CONFIG)
    change(tokenizer, config)
    return tokenizer, config


def backwards(value: Any) -> Any:
    """The same JSON with every object's keys in the opposite order."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


SAME: dict[str, Callable[[Any, Any], object]] = {
    "pairs of merges": lambda t, c: t["model"].update(merges=[["a", "b"]]),
    "order of added tokens": lambda t, c: t["added_tokens"].reverse(),
    "truncation": lambda t, c: t.update(truncation={"max_length": 5}),
    "padding": lambda t, c: t.update(padding={"length": 5}),
    "version": lambda t, c: t.update(version="2.0"),
    "other config": lambda t, c: c.update(model_max_length=99, pad_token="x"),
    "eos as text": lambda t, c: c.update(eos_token="<eos>"),
}
DIFFERENT: dict[str, Callable[[Any, Any], object]] = {
    "a token": lambda t, c: t["model"]["vocab"].update({"Ġ": 9, "c": 3}),
    "two ids": lambda t, c: t["model"]["vocab"].update(a=1, b=0),
    "a new token": lambda t, c: t["model"]["vocab"].update(c=6),
    "merges": lambda t, c: t["model"].update(merges=[]),
    "ignore_merges": lambda t, c: t["model"].update(ignore_merges=True),
    "model type": lambda t, c: t["model"].update(type="WordPiece"),
    "pattern": lambda t, c: t["pre_tokenizer"].update(pattern={"Regex": "x"}),
    "normalizer": lambda t, c: t.update(normalizer=None),
    "post_processor": lambda t, c: t.update(post_processor=None),
    "decoder": lambda t, c: t.update(decoder=None),
    "special token": lambda t, c: t["added_tokens"].pop(),
    "special flag": lambda t, c: t["added_tokens"][0].update(special=False),
    "template": lambda t, c: c.update(chat_template="{{ other }}"),
    "no template": lambda t, c: c.pop("chat_template"),
    "bos": lambda t, c: c.update(bos_token="<eos>"),
    "add_bos_token": lambda t, c: c.update(add_bos_token=True),
}


@pytest.mark.parametrize("name", SAME)
def test_what_leaves_ids_alone_changes_nothing(tmp_path: Path, name: str) -> None:
    base = tokenizer_fingerprint(write(tmp_path / "base"))
    assert base is not None
    assert len(base) == 32
    assert tokenizer_fingerprint(write(tmp_path / "other", *changed(SAME[name]))) == base


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_changes_ids_changes_it(tmp_path: Path, name: str) -> None:
    base = tokenizer_fingerprint(write(tmp_path / "base"))
    assert tokenizer_fingerprint(write(tmp_path / "other", *changed(DIFFERENT[name]))) != base


def test_layout_of_the_files_does_not_matter(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    other = write(tmp_path / "other", backwards(TOKENIZER), backwards(CONFIG))
    (other / "tokenizer.json").write_text(
        json.dumps(json.loads((other / "tokenizer.json").read_text()), indent=4, ensure_ascii=False)
    )
    assert tokenizer_fingerprint(base) == tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(base) == tokenizer_fingerprint(base / "tokenizer.json")


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    base = tokenizer_fingerprint(write(tmp_path / "base"))
    same = write(tmp_path / "same", config={**CONFIG, "chat_template": "unused"})
    (same / "chat_template.jinja").write_text(CONFIG["chat_template"])
    assert tokenizer_fingerprint(same) == base


def test_the_form_is_stable(tmp_path: Path) -> None:
    """Fails when the canonical form changes: then FORMAT has to change too."""
    found = tokenizer_fingerprint(write(tmp_path))
    assert found is not None
    assert found.hex().startswith("d58c4fa0b7013fc0")


def ranks(path: Path, tokens: list[bytes]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tiktoken_files(tmp_path: Path) -> None:
    file = ranks(tmp_path / "x.tiktoken", [b"a", b"b", b"\xff"])
    base = tokenizer_fingerprint(file)
    assert base == tokenizer_fingerprint(tmp_path)
    assert base is not None
    file.write_text("\n".join(reversed(file.read_text().splitlines())))
    assert tokenizer_fingerprint(file) == base
    assert tokenizer_fingerprint(ranks(file, [b"b", b"a", b"\xff"])) != base
    (tmp_path / "y.tiktoken").write_text("")
    with pytest.raises(ValueError, match="several"):
        tokenizer_fingerprint(tmp_path)
    write(tmp_path)
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(tmp_path / "tokenizer.json")


def test_unigram_vocabularies(tmp_path: Path) -> None:
    def unigram(*pieces: str) -> Any:
        vocabulary = [[piece, -1.5] for piece in pieces]
        return {**TOKENIZER, "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}}

    one = tokenizer_fingerprint(write(tmp_path / "1", unigram("<unk>", "a")))
    assert one == tokenizer_fingerprint(write(tmp_path / "2", unigram("<unk>", "a")))
    assert one != tokenizer_fingerprint(write(tmp_path / "3", unigram("a", "<unk>")))


def test_none_and_errors(tmp_path: Path) -> None:
    assert tokenizer_fingerprint(tmp_path) is None
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(b"")
    assert tokenizer_fingerprint(checkpoint) is None
    with pytest.raises(FileNotFoundError):
        tokenizer_fingerprint(tmp_path / "missing")
    for content in ("", "[]", "\x00"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(JsonFileError, match=r"^tokenizer\.json "):
            tokenizer_fingerprint(tmp_path)
    for content in ("{}", '{"model": []}', '{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            tokenizer_fingerprint(tmp_path)
    bad = tmp_path / "bad.tiktoken"
    bad.write_text("YQ== one\n")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        tokenizer_fingerprint(bad)


def test_a_damaged_companion_is_named_instead_of_the_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, TOKENIZER)
    (tmp_path / "tokenizer_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"^tokenizer_config\.json is a Git LFS pointer"):
        tokenizer_fingerprint(tmp_path)


def test_big_vocabularies_are_quick(tmp_path: Path) -> None:
    tokens = [f"Ġtoken{index}" for index in range(150_000)]
    model = {
        "type": "BPE",
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [[token[:3], token[3:]] for token in tokens],
    }
    write(tmp_path, {**TOKENIZER, "model": model})
    started = time.process_time()
    assert tokenizer_fingerprint(tmp_path) is not None
    assert time.process_time() - started < 1.0
