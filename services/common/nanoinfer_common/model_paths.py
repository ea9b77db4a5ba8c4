"""What a `--model` path says by itself: the served name, and why it may be no servable model."""

import re
from pathlib import Path
from typing import Final

from nanoinfer_common.json_files import is_lfs_pointer, lfs_message

# suffixes of single files; a directory's name is never cut, whatever dots are in it
FILE_SUFFIXES: Final = frozenset(
    {".pt", ".pth", ".bin", ".gguf", ".safetensors", ".json", ".tiktoken", ".ckpt"}
)
_SNAPSHOT: Final = re.compile(r"models--(?P<id>[^/]+)/snapshots/[^/]+")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONVERT: Final = (
    "convert it: load it in transformers and call save_pretrained(DIRECTORY), which writes"
    " safetensors"
)
_GGUF: Final = (
    "GGUF is not supported: give the directory of the original model, with config.json and"
    " .safetensors files"
)


def model_name(path: Path) -> str:
    """Returns a model's name: its directory's, whole, or its file's without a known suffix.

    A snapshot in the Hugging Face cache (`models--ORG--NAME/snapshots/REVISION`) is `ORG/NAME`.
    """
    path = path.absolute()
    # a file of the cache is a link to a blob whose name says nothing; its directory is resolved
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    snapshot = _SNAPSHOT.fullmatch("/".join(path.parts[-3:]))
    if snapshot is not None:
        return snapshot["id"].replace("--", "/")
    if path.is_dir() or path.suffix.lower() not in FILE_SUFFIXES:
        return path.name
    return path.name[: -len(path.suffix)]


def unservable(path: Path) -> str | None:
    """Returns why `path` is no model that these services read, and what to do; None if it may be.

    Looks at names and first bytes alone, so that every service can ask it before anything else.
    """
    if path.is_dir():
        return _unservable_directory(path)
    if not path.exists():
        return _missing(path)
    if is_lfs_pointer(path):
        return lfs_message(path)
    suffix = path.suffix.lower()
    if suffix == ".gguf" or _begins_with(path, b"GGUF"):
        return _GGUF
    if suffix == ".safetensors":
        return "give its directory, where config.json is, not the .safetensors file"
    if suffix == ".bin":
        return f"a PyTorch .bin file of weights is not read; {_CONVERT} and give that directory"
    return None


def _missing(path: Path) -> str:
    message = "no such file or directory"
    if _HUB_ID.fullmatch(str(path)) and path.suffix.lower() not in FILE_SUFFIXES:
        message += (
            f"; a hub id is not downloaded: run `hf download {path} --local-dir DIRECTORY`"
            " and give that directory"
        )
    return message


def _unservable_directory(path: Path) -> str | None:
    weights = {each.name for each in path.glob("*.safetensors")}
    adapter = (path / "adapter_config.json").is_file()
    if adapter and weights <= {"adapter_model.safetensors"}:
        return (
            "a LoRA adapter without its base model: merge them (merge_and_unload and"
            " save_pretrained of the peft library) and give the merged model's directory"
        )
    if (path / "config.json").is_file():
        return None if weights else _without_safetensors(path)
    if any(path.glob("*.gguf")):
        return _GGUF
    if (path / "snapshots").is_dir():
        found = sorted(each.name for each in (path / "snapshots").iterdir())
        return (
            f"a directory of the hub's cache: give snapshots/{found[-1] if found else 'REVISION'}"
        )
    return None


def _without_safetensors(path: Path) -> str | None:
    weights = sorted(each.name for each in path.glob("pytorch_model*.bin"))
    if weights:
        return f"holds {weights[0]}, but no .safetensors file; {_CONVERT}"
    return _GGUF if any(path.glob("*.gguf")) else None


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as opened:
            return opened.read(len(magic)) == magic
    except OSError:
        return False
