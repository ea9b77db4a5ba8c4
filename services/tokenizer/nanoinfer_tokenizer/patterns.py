"""Pre-tokenizer patterns that tiktoken and the `tokenizers` library read alike.

Each one matches every character, so "pieces between matches" (kept by one library, dropped by the
other) do not exist. A pattern that is not in this table is left to the `tokenizers` library.
"""

from collections.abc import Mapping
from types import MappingProxyType

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(suffix: str) -> str:
    """Words that start a new piece where lower case turns into upper case."""
    head = r"[^\r\n\p{L}\p{N}]?"
    return f"{head}{_UPPER}*{_LOWER}+{suffix}|{head}{_UPPER}+{_LOWER}*{suffix}"


PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "llama3": (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
            + _SPACES
        ),
        "qwen2": (
            _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
        ),
        "qwen3.5": (
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
            + _SPACES
        ),
        "o200k": (
            _cased_words(_CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
        ),
        "tekken": _cased_words("") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES,
    }
)

# What a rank file of each family appends to its ranks, in id order, unless settings say otherwise.
RANK_FILE_SPECIAL_TOKENS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gpt2": ("<|endoftext|>",),
        "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
        "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    }
)
