"""Conversations to rendered text, in which no message can forge a control token."""

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
from nanoinfer_tokenizer.template_worker import ChatEnvironment

# Roles that a template may handle without naming them.
_COMMON_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MAX_TEMPLATE = 1 << 20  # characters; real ones have some ten thousand
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
        self._roles = _COMMON_ROLES.union(_compared_words(_parse(template)))
        self._guard = ContentGuard(loaded.encoding.control.tokens, template)
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
            },
            protected.stand_ins,
        )
        return RenderedChat(rendered, protected.restore)

    def close(self) -> None:
        """Ends the template's processes."""
        self._processes.close()


def _parse(template: str) -> nodes.Template:
    """Reads `template`. Raises `TokenizerFileError` where it is too big, too deep or wrong."""
    if len(template) > _MAX_TEMPLATE:
        raise TokenizerFileError(
            f"the chat template has {len(template)} characters, more than {_MAX_TEMPLATE}"
        )
    try:
        return ChatEnvironment().parse(template)
    except TemplateSyntaxError as error:
        raise TokenizerFileError(f"the chat template does not compile: {error}") from error
    except RecursionError as error:
        raise TokenizerFileError("the chat template is nested too deep") from error


def _compared_words(tree: nodes.Template) -> Iterator[str]:
    """Finds the words that the template compares something with: its roles are among them."""
    for comparison in tree.find_all(nodes.Compare):
        for constant in comparison.find_all(nodes.Const):
            if isinstance(constant.value, str) and _ROLE.fullmatch(constant.value):
                yield constant.value
