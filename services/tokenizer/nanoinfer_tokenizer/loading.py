"""Finds a model's tokenizer files and chooses what encodes them.

A tokenizer is a directory, a `tokenizer.json` or a `.tiktoken` rank file. The chat template, the
names of special tokens and EOS come from the files beside it, where there are any.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoinfer_common.fingerprint import find_tokenizer

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


def load_tokenizer(path: Path, rank_file: RankFileOptions | None = None) -> LoadedTokenizer:
    """Loads the tokenizer at `path`; `rank_file` completes a `.tiktoken` file.

    Raises `TokenizerFileError` for files that are missing, damaged or of no servable kind.
    """
    try:
        file = find_tokenizer(path)
        if file is None:
            raise TokenizerFileError(f"{path} holds neither tokenizer.json nor a .tiktoken file")
        if file.suffix == ".tiktoken":
            encoding: Encoding = _load_ranks(file, rank_file or RankFileOptions())
            return _with_neighbours(path, file, encoding, Frame())
        if rank_file is not None:
            raise TokenizerFileError(f"{file.name} brings its own pattern and special tokens")
        document = _read_object(file)
        template = _chat_template(file.parent, _read_config(file.parent))
        encoding = _load_document(document, template or "")
        return _with_neighbours(path, file, encoding, read_frame(document))
    except TokenizerFileError:
        raise
    except RecursionError as error:
        raise TokenizerFileError(f"the tokenizer at {path} is nested too deep") from error
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
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
        raise TokenizerFileError(f"{file.name} is not a rank file") from error
    special_tokens = options.special_tokens
    if special_tokens is None:
        special_tokens = RANK_FILE_SPECIAL_TOKENS.get(options.pattern, ())
    return ByteLevelEncoding(spec_from_ranks(ranks, options.pattern, special_tokens))


def _with_neighbours(path: Path, file: Path, encoding: Encoding, frame: Frame) -> LoadedTokenizer:
    """Adds what the files beside `file` say."""
    directory = file.parent
    config = _read_config(directory)
    named = {name: _token_text(value) for name, value in config.items() if name.endswith("_token")}
    tokens = {name: text for name, text in named.items() if isinstance(text, str)}
    path = path.resolve()
    return LoadedTokenizer(
        name=path.name if path.is_dir() else path.stem,
        encoding=encoding,
        frame=_flagged(frame, config, encoding, tokens),
        eos_token_ids=_eos_token_ids(directory, encoding, tokens.get("eos_token")),
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
    return _read_object(directory / "tokenizer_config.json", optional=True)


def _token_text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _eos_token_ids(directory: Path, encoding: Encoding, eos_token: str | None) -> tuple[int, ...]:
    """Collects EOS from the generation config (or the model's), then the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        configured = _read_object(directory / name, optional=True).get("eos_token_id")
        if configured is not None:
            break
    listed = configured if isinstance(configured, list) else [configured]
    token_ids = [token_id for token_id in listed if isinstance(token_id, int)]
    special = encoding.vocabulary.special
    token_ids += [token_id for token_id, text in special.items() if text == eos_token]
    return tuple(dict.fromkeys(token_ids))


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


def _read_object(file: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerFileError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerFileError(f"{file.name} is not a JSON object")
    return value
