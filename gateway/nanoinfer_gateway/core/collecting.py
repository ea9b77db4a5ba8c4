"""Whole answers: the stream of updates, collected."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from nanoinfer.v1 import gateway_pb2, generation_pb2

from nanoinfer_gateway.core.completions import Update


@dataclass
class Answer:
    """All completions of a request: one choice an index, in order."""

    prompt_info: generation_pb2.PromptInfo | None = None
    choices: list[gateway_pb2.Choice] = field(default_factory=list)
    summary: generation_pb2.GenerationSummary | None = None


async def collect(updates: AsyncGenerator[Update, None]) -> Answer:
    """Read all updates into one answer."""
    answer = Answer()
    texts: dict[int, list[str]] = {}
    choices: dict[int, gateway_pb2.Choice] = {}

    def choice(index: int) -> gateway_pb2.Choice:
        return choices.setdefault(index, gateway_pb2.Choice(index=index))

    async with aclosing(updates):
        async for update in updates:
            if update.prompt_info is not None:
                answer.prompt_info = update.prompt_info
            for delta in update.deltas:
                texts.setdefault(delta.index, []).append(delta.text)
                choice(delta.index).token_ids.extend(delta.token_ids)
                choice(delta.index).logprobs.extend(delta.logprobs)
            for finish in update.finishes:
                choice(finish.index).finish.CopyFrom(finish)
            if update.summary is not None:
                answer.summary = update.summary
    for index in sorted(choices):
        choices[index].text = "".join(texts.get(index, ()))
        answer.choices.append(choices[index])
    return answer
