"""The ids that end a model's text, decided here for tokenizer and engine alike.

It is a union, because each file alone is known to lack one: of a chat model that was tuned from a
base model `config.json` may still name the base's `<|endoftext|>`, and only the tokenizer the
`<|im_end|>` that ends a turn. An id that no file names ends nothing: configuration classes'
defaults (such as 2 for Llama) are left out, because they are wrong for another vocabulary.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from nanoinfer_common.fingerprint import find_tokenizer
from nanoinfer_common.json_files import read_object, read_optional_object

_MODEL_FILES: Final = ("generation_config.json", "config.json")
_TOKENIZER_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json")


def eos_token_ids(model: Path, tokenizer: Path | None = None) -> tuple[int, ...]:
    """Returns the ids, ascending: what the model's configurations and its tokenizer name.

    `eos_token_id` of generation_config.json and config.json where `model` is a directory, and the
    id of `eos_token` in tokenizer_config.json and special_tokens_map.json beside the tokenizer
    (the model's own where none is given). Raises ValueError naming the file at fault.
    """
    found: set[int] = set()
    if model.is_dir():
        for name in _MODEL_FILES:
            found.update(_configured(read_optional_object(model / name), name))
    file = find_tokenizer(tokenizer or model)
    if file is not None:
        found.update(_named(file))
    return tuple(sorted(found))


def _configured(config: Mapping[str, Any], name: str) -> list[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    for each in values:
        if not isinstance(each, int) or isinstance(each, bool) or each < 0:
            raise ValueError(
                f"{name}: eos_token_id is {str(value)[:80]}, must be an id or a list of ids"
            )
    return values


def _named(tokenizer: Path) -> Iterator[int]:
    """The ids of the tokens that the files beside the tokenizer call `eos_token`."""
    directory = tokenizer.parent
    files = {name: read_optional_object(directory / name) for name in _TOKENIZER_FILES}
    texts = {_text(content.get("eos_token"), name) for name, content in files.items()} - {None}
    if texts:
        ids = _ids(tokenizer, files["tokenizer_config.json"])
        yield from (ids[text] for text in texts if text in ids)


def _text(token: Any, name: str) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{name}: eos_token is {str(token)[:80]}, must be a token's text")
    return text


def _ids(tokenizer: Path, config: Mapping[str, Any]) -> dict[Any, int]:
    """Ids by text; of a rank file, which names no token, those that the configuration adds."""
    try:
        if tokenizer.suffix == ".tiktoken":
            added = (config.get("added_tokens_decoder") or {}).items()
            return {token["content"]: int(token_id) for token_id, token in added}
        document = read_object(tokenizer)
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [spelling, score], the id being the position
            vocabulary = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
        added = document.get("added_tokens") or ()
        return {**vocabulary, **{token["content"]: token["id"] for token in added}}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{tokenizer.name} is not a tokenizer: {error!r}") from error
