"""Finds a model's tokenizer files and chooses what encodes them.

A tokenizer is a directory, a `tokenizer.json` or a `.tiktoken` rank file. The chat template, the
names of special tokens and EOS come from the files beside it, where there are any.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoinfer_common.eos import eos_token_ids
from nanoinfer_common.fingerprint import find_tokenizer
from nanoinfer_common.json_files import (
    JsonFileError,
    is_lfs_pointer,
    lfs_message,
    read_object,
    read_optional_object,
)
from nanoinfer_common.model_paths import model_name, unservable

from nanoinfer_tokenizer.byte_level import (
    ByteLevelEncoding,
    UnrepresentableError,
    spec_from_document,
    spec_from_ranks,
)
from nanoinfer_tokenizer.document import read_added_tokens, read_frame
from nanoinfer_tokenizer.encodings import Encoding, Frame, TokenizerFileError
from nanoinfer_tokenizer.library import LibraryEncoding
from nanoinfer_tokenizer.patterns import RANK_FILE_SPECIAL_TOKENS


@dataclass(frozen=True, slots=True)
class RankFileOptions:
    """What a rank file leaves out: its pre-tokenizer pattern and its special tokens, in id order.

    None stands for the pattern's own special tokens.
    """

    pattern: str = "gpt2"
    special_tokens: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A model's tokenizer. `template_tokens` are the names that its chat template may use."""

    name: str
    encoding: Encoding
    frame: Frame
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    template_tokens: Mapping[str, Any] = field(default_factory=dict)


def load_tokenizer(
    path: Path, rank_file: RankFileOptions | None = None, model: Path | None = None
) -> LoadedTokenizer:
    """Loads the tokenizer at `path`; `rank_file` completes a `.tiktoken` file.

    `model` is whose configurations name EOS, too; unset, it is `path`. Raises `TokenizerFileError`
    for files that are missing, damaged or of no servable kind.
    """
    try:
        file = find_tokenizer(path) if path.exists() else None
        if file is None:
            raise TokenizerFileError(_no_tokenizer(path))
        if file.suffix == ".tiktoken":
            encoding: Encoding = _load_ranks(file, rank_file or RankFileOptions())
            return _with_neighbours(path, file, encoding, Frame(), model or path)
        if rank_file is not None:
            raise TokenizerFileError(f"{file.name} brings its own pattern and special tokens")
        document = read_object(file)
        template = _chat_template(file.parent, _read_config(file.parent))
        encoding, frame = _load_document(document, template or ""), read_frame(document)
        return _with_neighbours(path, file, encoding, frame, model or path)
    except TokenizerFileError:
        raise
    except JsonFileError as error:
        raise TokenizerFileError(str(error)) from error
    except RecursionError as error:
        raise TokenizerFileError(f"the tokenizer at {path} is nested too deep") from error
    except (ValueError, OSError) as error:
        raise TokenizerFileError(f"the tokenizer at {path} cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerFileError(f"the tokenizer at {path} cannot be read: {error!r}") from error


def _load_document(document: Mapping[str, Any], template: str) -> Encoding:
    added_tokens = read_added_tokens(document, template)
    try:
        return ByteLevelEncoding(spec_from_document(document, added_tokens))
    except UnrepresentableError as reason:
        return LibraryEncoding(document, added_tokens, str(reason))


def _load_ranks(file: Path, options: RankFileOptions) -> Encoding:
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        reason = lfs_message(file) if is_lfs_pointer(file) else f"{file.name} is not a rank file"
        raise TokenizerFileError(reason) from error
    special_tokens = options.special_tokens
    if special_tokens is None:
        special_tokens = RANK_FILE_SPECIAL_TOKENS.get(options.pattern, ())
    return ByteLevelEncoding(spec_from_ranks(ranks, options.pattern, special_tokens))


def _no_tokenizer(path: Path) -> str:
    """Why there is none at `path`, and what to do: the engine's own reason where it has one."""
    reason = unservable(path)
    if reason is not None:
        return reason
    if not path.is_dir():
        return (
            "the file brings no tokenizer: name one by --tokenizer (a directory, tokenizer.json or"
            " a .tiktoken file)"
        )
    older = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if _has(path, name)]
    if older:
        return (
            f"holds {older[0]}, but no tokenizer.json: load it with transformers' AutoTokenizer and"
            " call save_pretrained, which writes one"
        )
    return (
        "holds neither tokenizer.json nor a .tiktoken file; name a tokenizer elsewhere by"
        " --tokenizer"
    )


def _has(directory: Path, name: str) -> bool:
    return (directory / name).is_file()


def _with_neighbours(
    path: Path, file: Path, encoding: Encoding, frame: Frame, model: Path
) -> LoadedTokenizer:
    """Adds what the files beside `file` say."""
    directory = file.parent
    config = _read_config(directory)
    named = {name: _token_text(value) for name, value in config.items() if name.endswith("_token")}
    tokens = {name: text for name, text in named.items() if isinstance(text, str)}
    return LoadedTokenizer(
        name=model_name(path),
        encoding=encoding,
        frame=_flagged(frame, config, encoding, tokens),
        eos_token_ids=eos_token_ids(model, file),
        chat_template=_chat_template(directory, config),
        template_tokens=tokens,
    )


def _flagged(
    frame: Frame, config: Mapping[str, Any], encoding: Encoding, tokens: Mapping[str, str]
) -> Frame:
    """Follows `add_bos_token` and `add_eos_token` where the config sets them.

    Unset, a flag leaves the post-processor's word. A model that has no such token adds none.
    """
    prefix, suffix = frame.prefix, frame.suffix
    if (adds_bos := _flag(config, "add_bos_token")) is not None:
        bos = _token_ids(encoding, tokens.get("bos_token"), must_exist=adds_bos)
        others = tuple(token_id for token_id in prefix if token_id not in bos)
        prefix = bos + others if adds_bos else others
    if (adds_eos := _flag(config, "add_eos_token")) is not None:
        eos = _token_ids(encoding, tokens.get("eos_token"), must_exist=adds_eos)
        others = tuple(token_id for token_id in suffix if token_id not in eos)
        suffix = others + eos if adds_eos else others
    return Frame(prefix, suffix)


def _flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerFileError(f"tokenizer_config.json has {name} = {value!r}, no true or false")
    return value


def _token_ids(encoding: Encoding, text: str | None, *, must_exist: bool) -> tuple[int, ...]:
    """Finds the token that the config names; nothing where it names none."""
    if text is None:
        return ()
    if token := encoding.control.tokens.get(text):
        return (token.id,)
    tokens = encoding.vocabulary.spelling.tokens
    if (data := text.encode()) in tokens:
        return (tokens.index(data),)
    if must_exist:
        raise TokenizerFileError(f"tokenizer_config.json adds {text!r}, which is no token")
    return ()


def _read_config(directory: Path) -> dict[str, Any]:
    return read_optional_object(directory / "tokenizer_config.json")


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Reads the default chat template; a file of its own goes before the config's entry."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerFileError("tokenizer_config.json has a chat_template of unknown form")
    return template
