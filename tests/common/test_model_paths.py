"""What a path says: the name under which a model is served, and why it may be no model."""

from __future__ import annotations

from pathlib import Path

import pytest
from nanoinfer_common.model_paths import model_name, unservable

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def touch(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    "name",
    ["Llama-3.1-8B-Instruct", "Qwen2.5-0.5B", "model.pt", "v1.0", "a.safetensors", "x.gguf", "m"],
)
def test_a_directorys_name_is_never_cut(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert model_name(tmp_path / name) == name


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ckpt.pt", "ckpt"),
        ("gpt-2.5.pth", "gpt-2.5"),
        ("Llama-3.1-8B.Q4_K_M.gguf", "Llama-3.1-8B.Q4_K_M"),
        ("model.safetensors", "model"),
        ("MODEL.PT", "MODEL"),
        ("vocabulary.tiktoken", "vocabulary"),
        ("Llama-3.1", "Llama-3.1"),
    ],
)
def test_of_a_file_only_a_known_suffix_is_cut(file: str, name: str, tmp_path: Path) -> None:
    assert model_name(tmp_path / file) == name
    assert model_name(touch(tmp_path / file)) == name


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("models--meta-llama--Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("models--gpt2", "gpt2"),
    ],
)
def test_a_snapshot_of_the_hubs_cache_has_the_repositorys_name(
    repository: str, name: str, tmp_path: Path
) -> None:
    snapshot = tmp_path / repository / "snapshots" / "0e9e39f249a16976918f6564b8830bc894c89659"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == name
    (tmp_path / "link").symlink_to(snapshot)
    assert model_name(tmp_path / "link") == name
    blob = touch(tmp_path / repository / "blobs" / "5f0f1c")
    (snapshot / "ckpt.pt").symlink_to(blob)
    assert model_name(snapshot / "ckpt.pt") == "ckpt"


def test_a_relative_path_has_the_directorys_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Qwen2.5-7B").mkdir()
    monkeypatch.chdir(tmp_path / "Qwen2.5-7B")
    assert model_name(Path()) == "Qwen2.5-7B"
    assert model_name(Path("../Qwen2.5-7B/")) == "Qwen2.5-7B"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"x.gguf": "GGUF"}, "GGUF is not supported: give the directory of the original model"),
        ({"config.json": "{}", "x.gguf": "GGUF"}, "GGUF is not supported"),
        ({"adapter_config.json": "{}", "tokenizer.json": "{}"}, "merge_and_unload"),
        (
            {"adapter_config.json": "{}", "config.json": "{}", "adapter_model.safetensors": ""},
            "merge_and_unload",
        ),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "holds pytorch_model.bin, but no .safe"),
        ({"config.json": "{}", "pytorch_model-00001-of-00002.bin": ""}, "save_pretrained"),
        ({"snapshots/abc/config.json": "{}"}, "give snapshots/abc"),
    ],
)
def test_a_directory_of_another_kind_is_named_with_what_to_do(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        touch(tmp_path / name, content)
    assert said in (unservable(tmp_path) or "")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("m.gguf", "GGUF", "GGUF is not supported"),
        ("renamed.pt", "GGUF\x03", "GGUF is not supported"),
        ("model.safetensors", "", "give its directory"),
        ("pytorch_model.bin", "", "save_pretrained"),
        ("ckpt.pt", POINTER, "git lfs pull"),
        ("tokenizer.json", POINTER, "git lfs pull"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_to_do(
    file: str, content: str, said: str, tmp_path: Path
) -> None:
    assert said in (unservable(touch(tmp_path / file, content)) or "")


def test_a_hub_id_is_told_from_a_path_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = unservable(Path("Qwen/Qwen2.5-0.5B-Instruct")) or ""
    assert "hf download Qwen/Qwen2.5-0.5B-Instruct" in said
    for path in (Path("a/b.pt"), tmp_path / "Qwen" / "Qwen2.5", Path("./x"), Path("a/b/c")):
        assert unservable(path) == "no such file or directory"


def test_what_may_be_served_is_left_to_the_services(tmp_path: Path) -> None:
    touch(tmp_path / "model" / "config.json")
    touch(tmp_path / "model" / "model.safetensors")
    touch(tmp_path / "model" / "pytorch_model.bin")
    touch(tmp_path / "model" / "adapter_config.json")
    assert unservable(tmp_path / "model") is None
    assert unservable(touch(tmp_path / "ckpt.pt")) is None
    assert unservable(touch(tmp_path / "tokenizer.json")) is None
