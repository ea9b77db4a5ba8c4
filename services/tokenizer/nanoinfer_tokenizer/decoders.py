"""The `decoder` of a `tokenizer.json`, as rules that spell ids one by one.

Each step of the library's decoder maps a list of tokens to another list. Steps that look at one
token at a time, and at its being the first, are applied here, once, to the whole vocabulary. What
is left, runs of bytes and the spaces that a text begins with, is said in `Spelling`. A decoder that
does more than that cannot be streamed and is refused.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from nanoinfer_common.detokenize import Spelling

from nanoinfer_tokenizer.document import Document, build_table, byte_level_bytes, flatten
from nanoinfer_tokenizer.encodings import AddedToken, TokenizerFileError, Vocabulary

# Spells one token; the flag says that it is the first of its text.
_Step: TypeAlias = Callable[[str, bool], str]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def read_vocabulary(
    document: Document, pieces: Mapping[int, str], added_tokens: Iterable[AddedToken]
) -> Vocabulary:
    """Spells `pieces` and the added tokens, which the decoder does not tell apart.

    Raises `TokenizerFileError` where what a token reads depends on more than `Spelling` knows.
    """
    added = list(added_tokens)
    texts = {**pieces, **{token.id: token.content for token in added}}
    special = {token.id: token.content for token in added if token.special}
    steps = flatten(document.get("decoder"), "decoders")
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return Vocabulary(byte_level_spelling(texts), special)
    return Vocabulary(_spell(steps, texts), special)


def byte_level_spelling(texts: Mapping[int, str]) -> Spelling:
    """Spells byte-level tokens; one with a character outside the byte alphabet is itself."""
    table = {token_id: byte_level_bytes(text) or text.encode() for token_id, text in texts.items()}
    return Spelling(build_table(table))


def _spell(steps: list[Document], texts: Mapping[int, str]) -> Spelling:
    """Takes the steps in the order that can be streamed: single tokens, bytes, the whole text."""
    left = [str(step["type"]) for step in steps]
    num_single = next((i for i, kind in enumerate(left) if kind not in _SINGLE), len(left))
    single = [_SINGLE[step["type"]](step) for step in steps[:num_single]]
    left = left[num_single:]
    has_bytes = left[:1] == ["ByteFallback"]
    left = left[has_bytes:]
    is_fused = left[:1] == ["Fuse"]
    left = left[is_fused:]
    if not steps or (left and not is_fused) or set(left) - {"Strip"}:
        kinds = [step["type"] for step in steps]
        raise TokenizerFileError(f"decoder {kinds} cannot decode token by token")
    strips = steps[len(steps) - len(left) :]
    return _make_spelling(texts, single, has_bytes, sum(map(_num_stripped, strips)))


def _make_spelling(
    texts: Mapping[int, str], single: list[_Step], has_bytes: bool, spaces: int
) -> Spelling:
    def spell(text: str, is_first: bool) -> str:
        for step in single:
            text = step(text, is_first)
        return text

    spelled = {token_id: spell(text, False) for token_id, text in texts.items()}
    first = {token_id: spell(text, True) for token_id, text in texts.items()}
    table = {token_id: text.encode() for token_id, text in spelled.items()}
    byte_ids: set[int] = set()
    for token_id, text in spelled.items() if has_bytes else ():
        if match := _BYTE_PIECE.fullmatch(text):
            table[token_id] = bytes.fromhex(match[1])
            byte_ids.add(token_id)
    return Spelling(
        tokens=build_table(table),
        byte_ids=frozenset(byte_ids),
        first_tokens={i: text.encode() for i, text in first.items() if text != spelled[i]},
        strip_leading_spaces=spaces,
    )


def _replace(step: Document) -> _Step:
    pattern = step["pattern"].get("String")
    if not pattern:
        raise TokenizerFileError(f"decoder Replace has no plain text as its pattern: {step}")
    return lambda text, _: text.replace(pattern, step["content"])


def _metaspace(step: Document) -> _Step:
    sign = step["replacement"]
    scheme = step.get("prepend_scheme", "always")
    prepends = scheme != "never" and step.get("add_prefix_space", True) is not False
    return lambda text, is_first: text.replace(sign, "" if is_first and prepends else " ")


def _num_stripped(step: Document) -> int:
    if step["content"] != " ":
        raise TokenizerFileError(f"decoder Strip takes {step['content']!r} from a text")
    if step.get("stop"):
        raise TokenizerFileError("decoder Strip takes from the end, which a stream cannot know")
    return int(step["start"])


_SINGLE: Mapping[str, Callable[[Document], _Step]] = {
    "Replace": _replace,
    "Metaspace": _metaspace,
}
