"""The tokenizer's fingerprint: two tokenizers share it only if they turn every text into the same
ids by the same template.

It is the sha256 of a canonical JSON document: keys sorted, no white space, ASCII escapes. Of a
`tokenizer.json` the document holds

    format          "nanoinfer-tokenizer-1"
    tokens          [spelling, id] in id order, added tokens included
    merges          [left, right] in order of rank, whichever way the file spells pairs
    model           the model section without vocab and merges (type, ignore_merges, ...)
    sections        normalizer, pre_tokenizer (with its pattern), post_processor, decoder
    added           the added tokens with their flags, in id order
    special         bos, eos and unk token and the add_bos/add_eos flags of tokenizer_config.json
    chat_template   chat_template.jinja, or else tokenizer_config.json's

and of a `.tiktoken` file, which has neither merges nor sections, `tokens` (base64 spelling and
rank), `special` and `chat_template`. Padding, truncation and descriptions are left out: they do
not change ids here. A spelling is the file's own (byte-level alphabet, base64), which stands for
the token's bytes one to one. A directory has the fingerprint of the tokenizer file in it.
"""

import hashlib
import json
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from nanoinfer_common.json_files import JsonFileError, read_object, read_optional_object

FORMAT: Final = "nanoinfer-tokenizer-1"
SECTIONS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token")


def tokenizer_fingerprint(path: Path) -> bytes | None:
    """Returns 32 bytes for a directory, a `tokenizer.json` or a `.tiktoken` file; None where a
    directory has neither. ValueError where a file is not what its name says.
    """
    file = find_tokenizer(path)
    if file is None:
        return None
    try:
        document = _ranks(file) if file.suffix == ".tiktoken" else _tokenizer_json(file)
        document |= {"format": FORMAT, **_companions(file.parent)}
    except JsonFileError:
        raise  # names the file at fault, which may be one beside `file`
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a tokenizer: {error!r}") from error
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).digest()


def find_tokenizer(path: Path) -> Path | None:
    """Returns the tokenizer file that `path` is or holds: tokenizer.json before `.tiktoken`.

    FileNotFoundError where `path` does not exist, ValueError where several files could be meant.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer at {path}")
        return path if path.suffix in (".json", ".tiktoken") else None
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    ranks = sorted(path.glob("*.tiktoken"))
    if len(ranks) > 1:
        raise ValueError(f"{path} holds several .tiktoken files")
    return ranks[0] if ranks else None


def _tokenizer_json(file: Path) -> dict[str, Any]:
    content = read_object(file)
    model = dict(content["model"])
    vocabulary, merges = model.pop("vocab"), model.pop("merges", None)
    added = sorted(content.get("added_tokens") or (), key=itemgetter("id"))
    if isinstance(vocabulary, dict):
        ids = vocabulary | {token["content"]: token["id"] for token in added}
        tokens: Any = sorted(ids.items(), key=itemgetter(1, 0))
    else:
        # Unigram: a list of [spelling, score], the id being the position.
        tokens = list(vocabulary)
    pairs = merges and [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    return {
        "tokens": tokens,
        "merges": pairs,
        "model": model,
        "sections": {name: content.get(name) for name in SECTIONS},
        "added": added,
    }


def _ranks(file: Path) -> dict[str, Any]:
    lines = file.read_text(encoding="ascii").splitlines()
    pairs = (line.split() for line in lines if line.strip())
    return {"tokens": sorted(((token, int(rank)) for token, rank in pairs), key=itemgetter(1, 0))}


def _companions(directory: Path) -> dict[str, Any]:
    config = read_optional_object(directory / "tokenizer_config.json")
    template = config.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    special = {name: _content(config[name]) for name in SPECIAL if config.get(name) is not None}
    return {"special": special, "chat_template": template}


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token
