"""Conversations to rendered text, in which no message can forge a special token."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateSyntaxError, nodes

from nanoinfer_tokenizer.encodings import TokenizerFileError, translated
from nanoinfer_tokenizer.guard import ContentGuard
from nanoinfer_tokenizer.loading import LoadedTokenizer
from nanoinfer_tokenizer.template_process import (
    TemplateLimits,
    TemplateProcesses,
    TemplateRefusedError,
)
from nanoinfer_tokenizer.template_worker import template_environment

# Roles that a template may handle without naming them.
_COMMON_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Message:
    """One thing said in a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered conversation. `guarded` holds stand-ins that `restore` maps back (see `guard`)."""

    guarded: str
    restore: Mapping[int, int]

    @property
    def text(self) -> str:
        """The text as the template's author sees it."""
        return translated(self.guarded, self.restore)


class ChatRenderer:
    """Renders conversations with one model's template. Safe to use from threads."""

    def __init__(self, template: str, loaded: LoadedTokenizer, limits: TemplateLimits) -> None:
        """Compiles `template`. Raises `TokenizerFileError` where that fails."""
        try:
            tree = template_environment().parse(template)
        except TemplateSyntaxError as error:
            raise TokenizerFileError(f"the chat template does not compile: {error}") from error
        special = loaded.encoding.vocabulary.special.values()
        self._roles = _COMMON_ROLES.union(_compared_words(tree))
        self._guard = ContentGuard(special, _literals(tree))
        self._processes = TemplateProcesses(template, loaded.template_tokens, limits)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> RenderedChat:
        """Renders `messages`. Raises `TemplateRefusedError` or `TemplateTimeoutError`."""
        for message in messages:
            if message.role not in self._roles:
                raise TemplateRefusedError(f"role {message.role[:64]!r} is unknown")
        protected = self._guard.protect([message.content for message in messages])
        rendered = self._processes.render(
            {
                "messages": [
                    {"role": message.role, "content": content}
                    for message, content in zip(messages, protected.texts, strict=True)
                ],
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return RenderedChat(rendered, protected.restore)

    def close(self) -> None:
        """Ends the template's processes."""
        self._processes.close()


def _literals(tree: nodes.Template) -> Iterator[str]:
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


def _compared_words(tree: nodes.Template) -> Iterator[str]:
    """Finds the words that the template compares something with: its roles are among them."""
    for comparison in tree.find_all(nodes.Compare):
        for constant in comparison.find_all(nodes.Const):
            if isinstance(constant.value, str) and _ROLE.fullmatch(constant.value):
                yield constant.value
