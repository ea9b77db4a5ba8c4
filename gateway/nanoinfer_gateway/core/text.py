"""Text from token ids: incremental decoding and stop strings, one object per completion.

Everything here is synchronous, holds no more than a stop string and what the decoder cannot be
certain of, and gives the same text however the ids are cut into messages. It knows neither proto
nor network.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field

from nanoinfer_common.detokenize import Spelling, TextDecoder


@dataclass(eq=False)
class _Node:
    """A prefix of some stop string; `depth` is its length in characters."""

    depth: int
    children: "dict[str, _Node]" = field(default_factory=dict)
    fallback: "_Node | None" = None
    match: str | None = None


def _build(stops: Sequence[str]) -> _Node:
    """The automaton of all stop strings (Aho and Corasick, CACM 18(6), 1975)."""
    root = _Node(0)
    for stop in stops:
        node = root
        for character in stop:
            node = node.children.setdefault(character, _Node(node.depth + 1))
        node.match = stop
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for character, child in node.children.items():
            child.fallback = _step(node.fallback, character, root)
            # a node's own string is longer than what its fallback ends with, so it wins
            child.match = child.match or child.fallback.match
            queue.append(child)
    return root


def _step(node: _Node | None, character: str, root: _Node) -> _Node:
    """The longest prefix of a stop string that ends with `character` when coming from `node`."""
    while node is not None:
        child = node.children.get(character)
        if child is not None:
            return child
        node = node.fallback
    return root


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces and withholds what may become one.

    The match that is complete first wins; among those complete at the same character the longest.
    Withheld is the longest suffix that is a prefix of any stop string, so that no part of a matched
    string was ever given out. Cost per character does not grow with the number of strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._root = _build(stops)
        self._node = self._root
        self._withheld = ""
        self._initials = frozenset(self._root.children)

    def feed(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Return the text that is free to go out, and the stop string once one is complete.

        After a match the text is what stood before the string; what followed it is dropped. With
        `may_stop` false a string that becomes complete in this piece is ordinary text.
        """
        if self._node is self._root and self._initials.isdisjoint(text):
            return text, None
        root, node = self._root, self._node
        joined = self._withheld + text
        for end, character in enumerate(text, len(self._withheld) + 1):
            node = _step(node, character, root)
            if may_stop and node.match is not None:
                self._node, self._withheld = root, ""
                return joined[: end - len(node.match)], node.match
        free = len(joined) - node.depth
        self._node, self._withheld = node, joined[free:]
        return joined[:free], None

    def flush(self) -> str:
        """Give out what is withheld: no stop string can follow any more."""
        withheld, self._withheld, self._node = self._withheld, "", self._root
        return withheld


class CompletionText:
    """The text of one completion: decoder, stop strings, `min_tokens`.

    A stop string that is complete before `min_tokens` tokens were produced does not end the
    completion. `stop` is the string that did, `num_tokens` counts the tokens up to the one that
    completed it. `stop_ids` maps tokens that have no text here to the stop strings that they are.

    Byte tokens that the decoder holds back are looked at ahead, so that a string which they
    complete ends the completion at once.
    """

    def __init__(
        self,
        spelling: Spelling,
        stops: Sequence[str],
        *,
        stop_ids: Mapping[int, str] | None = None,
        min_tokens: int = 0,
        include_stop: bool = False,
        continues: bool = False,
    ) -> None:
        self._decoder = TextDecoder(spelling, continues=continues)
        self._matcher = StopMatcher(stops) if stops else None
        self._ahead: tuple[StopMatcher, list[str]] | None = None
        self._stop_ids = stop_ids or {}
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self.num_tokens = 0
        self.stop: str | None = None

    def echo(self, prompt: str | Sequence[int]) -> str:
        """Return the prompt's text, in which no stop string counts; for before the first `feed`.

        A character that ids of the prompt begin and the completion ends goes out with the latter.
        """
        return prompt if isinstance(prompt, str) else self._decoder.feed(prompt)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that may go out; looks at no id after the one that completes a match."""
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self._decoder.feed(token_ids)
        pieces: list[str] = []
        for token_id in token_ids:
            self.num_tokens += 1
            pieces.append(self._feed_one(self._matcher, token_id))
            if self.stop is not None:
                if self._include_stop:
                    pieces.append(self.stop)
                break
        return "".join(pieces)

    def flush(self) -> str:
        """Return the rest, when the completion ended without a stop string."""
        rest = self._decoder.flush()
        if self._matcher is None:
            return rest
        return self._matcher.feed(rest, may_stop=False)[0] + self._matcher.flush()

    def _feed_one(self, matcher: StopMatcher, token_id: int) -> str:
        may_stop = self.num_tokens >= self._min_tokens
        if may_stop and token_id in self._stop_ids:
            self.stop = self._stop_ids[token_id]
            return self.flush()
        # what was looked at ahead is certain now, and no string in it ended the completion
        free = ""
        if run := self._decoder.feed_run_before(token_id):
            free, self._ahead = matcher.feed(run, may_stop=False)[0], None
        if text := self._decoder.feed((token_id,)):
            more, self.stop = matcher.feed(text, may_stop=may_stop)
            return free + more
        if waiting := self._decoder.look_ahead():
            self._ahead = self._ahead or (copy(matcher), [])
            ahead, given = self._ahead
            more, self.stop = ahead.feed(waiting, may_stop=may_stop)
            given.append(more)
            if self.stop is not None:
                return free + "".join(given)
        return free
