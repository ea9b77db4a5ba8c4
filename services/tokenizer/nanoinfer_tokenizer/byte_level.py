"""Byte-level BPE on tiktoken.

tiktoken knows ranks, not merges: it joins any two neighbours whose bytes together are a token, the
lowest rank first, and takes a piece that is a token whole. A merge list says more than that, so a
`tokenizer.json` is converted only where both procedures must give the same ids (`convert_ranks`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import tiktoken
from nanoinfer_common.detokenize import Spelling
from tokenizers import models, normalizers

from nanoinfer_tokenizer.decoders import read_vocabulary
from nanoinfer_tokenizer.document import (
    Document,
    build_table,
    byte_level_bytes,
    flatten,
    read_merges,
)
from nanoinfer_tokenizer.encodings import (
    AddedToken,
    AddedTokens,
    EncodingInfo,
    TokenizerFileError,
    Vocabulary,
)
from nanoinfer_tokenizer.patterns import PATTERNS

_BYTES = frozenset(bytes([byte]) for byte in range(256))
_NAME_OF = {pattern: name for name, pattern in PATTERNS.items()}
_NFC = normalizers.NFC()


class UnrepresentableError(ValueError):
    """tiktoken would give other ids than this tokenizer; the text says why."""


@dataclass(frozen=True, slots=True)
class ByteLevelSpec:
    """Everything that a byte-level encoding is made of. `pattern` names one of `PATTERNS`."""

    pattern: str
    ranks: Mapping[bytes, int]
    added_tokens: Sequence[AddedToken]
    vocabulary: Vocabulary
    info: EncodingInfo
    nfc: bool = False


class ByteLevelEncoding:
    """Encodes with tiktoken. Added tokens and NFC are applied here, before it sees a piece."""

    def __init__(self, spec: ByteLevelSpec) -> None:
        """Builds tiktoken's tables from `spec`."""
        control = [token for token in spec.added_tokens if token.control]
        plain = [token for token in spec.added_tokens if not token.control]
        self.info = spec.info
        self.vocabulary = spec.vocabulary
        self.control = AddedTokens(control)
        self._raw = AddedTokens([token for token in plain if not token.normalized], hidden=control)
        self._normalized = AddedTokens([token for token in plain if token.normalized])
        self._nfc = spec.nfc
        self._encode_ordinary = tiktoken.Encoding(
            spec.pattern,
            pat_str=PATTERNS[spec.pattern],
            mergeable_ranks=dict(spec.ranks),
            special_tokens={},
        ).encode_ordinary

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Encodes plain text; what stood before it (`continues`) makes no difference here."""
        token_ids: list[int] = []
        for raw_part in self._raw.split(text):
            if isinstance(raw_part, int):
                token_ids.append(raw_part)
                continue
            # The library's own NFC, because Python's tables may be of an older Unicode.
            changes = self._nfc and not raw_part.isascii()
            normal = _NFC.normalize_str(raw_part) if changes else raw_part
            for part in self._normalized.split(normal):
                if isinstance(part, int):
                    token_ids.append(part)
                else:
                    token_ids.extend(self._encode_ordinary(part))
        return token_ids


def spec_from_document(document: Document, added_tokens: Sequence[AddedToken]) -> ByteLevelSpec:
    """Reads a `tokenizer.json`. Raises `UnrepresentableError` or `TokenizerFileError`."""
    model = document["model"]
    _check_model(model)
    if any(token.single_word and not token.control for token in added_tokens):
        raise UnrepresentableError("an added token matches whole words only")
    pattern = _read_pattern(document)
    normalizer = [step.get("type") for step in flatten(document.get("normalizer"), "normalizers")]
    if normalizer not in ([], ["NFC"]):
        raise UnrepresentableError(f"normalizer {normalizer} is not NFC")
    control = {token.content for token in added_tokens if token.control}
    pieces = {piece: token_id for piece, token_id in model["vocab"].items() if piece not in control}
    ranks = convert_ranks(
        pieces, read_merges(model), ignore_merges=bool(model.get("ignore_merges"))
    )
    # A byte-level file may leave its decoder out; there is only one that fits.
    decoder = document.get("decoder") or {"type": "ByteLevel"}
    texts = {token_id: piece for piece, token_id in pieces.items()}
    return ByteLevelSpec(
        pattern=pattern,
        ranks=ranks,
        added_tokens=added_tokens,
        vocabulary=read_vocabulary({"decoder": decoder}, texts, added_tokens),
        info=EncodingInfo("tiktoken", f"byte-level BPE, pattern {pattern}"),
        nfc=bool(normalizer),
    )


def spec_from_ranks(
    ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str]
) -> ByteLevelSpec:
    """Describes a plain rank file; `special_tokens` take the ids after the last rank."""
    if not ranks.keys() >= _BYTES or len(set(ranks.values())) != len(ranks):
        raise TokenizerFileError("a rank file needs all 256 bytes, and each rank once")
    first = max(ranks.values()) + 1
    added = [AddedToken(first + index, text) for index, text in enumerate(special_tokens)]
    special = {token.id: token.content for token in added}
    table = {rank: data for data, rank in ranks.items()}
    table |= {token_id: text.encode() for token_id, text in special.items()}
    return ByteLevelSpec(
        pattern=pattern,
        ranks=ranks,
        added_tokens=added,
        vocabulary=Vocabulary(Spelling(build_table(table)), special),
        info=EncodingInfo("tiktoken", f"rank file, pattern {pattern}"),
    )


def convert_ranks(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, ignore_merges: bool
) -> dict[bytes, int]:
    """Turns a merge list into ranks with which tiktoken gives the same ids.

    Why they are the same: what happens inside a token's bytes before the token is made depends on
    nothing around them. So the merges make a token somewhere only if they make it of its bytes
    alone, and always of the same two parts: tokens that they do not make are left out, and any two
    parts that tiktoken joins are then a merge. The order is the same where ids rise.

    Raises `UnrepresentableError` where that cannot be had.
    """
    made = [vocabulary.get(left + right, -1) for left, right in merges]
    if any(later < earlier for earlier, later in pairwise([0, *made])):
        raise UnrepresentableError("the merges are not in the order of their tokens' ids")
    try:
        model = models.BPE(vocab=dict(vocabulary), merges=list(merges))
    except Exception as error:  # the library raises plain Exception
        raise UnrepresentableError(f"a merge is of no use: {error}") from error
    ranks: dict[bytes, int] = {}
    whole_only: dict[bytes, int] = {}
    for piece, rank in vocabulary.items():
        if data := byte_level_bytes(piece):
            reached = len(data) == 1 or [token.id for token in model.tokenize(piece)] == [rank]
            (ranks if reached else whole_only)[data] = rank
    if not ranks.keys() >= _BYTES:
        raise UnrepresentableError("the vocabulary lacks some of the 256 bytes")
    if not ignore_merges:
        return ranks
    # These are taken where they are a whole piece. tiktoken must not join parts to them elsewhere.
    ranks.update(whole_only)
    for data, rank in whole_only.items():
        if _joined(data, ranks) == [data]:
            raise UnrepresentableError(f"token {rank} can be joined of parts that are no merge")
    return ranks


def _joined(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Joins `token`'s bytes as tiktoken does, lowest rank first and leftmost first."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 1:
        pairs = [left + right for left, right in pairwise(parts)]
        known = [(ranks[pair], index) for index, pair in enumerate(pairs) if pair in ranks]
        if not known:
            break
        _, index = min(known)
        parts[index : index + 2] = [pairs[index]]
    return parts


def _check_model(model: Document) -> None:
    """Refuses everything but a plain byte-level BPE model."""
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise UnrepresentableError(f"model {model.get('type')} is not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise UnrepresentableError(f"the BPE model uses {name}")


def _read_pattern(document: Document) -> str:
    """Names the pre-tokenizer's pattern."""
    steps = flatten(document.get("pre_tokenizer"), "pretokenizers")
    *splits, last = steps or [{}]
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True)
    if byte_level and not splits and last.get("use_regex", True):
        return "gpt2"
    if byte_level and len(splits) == 1 and not last.get("use_regex", True):
        split = splits[0]
        name = _NAME_OF.get((split.get("pattern") or {}).get("Regex", ""))
        how = (split.get("type"), split.get("behavior"), split.get("invert"))
        if name and how in (("Split", "Isolated", False), ("Split", "Removed", True)):
            return name
    raise UnrepresentableError("the pre-tokenizer is of no known byte-level family")
