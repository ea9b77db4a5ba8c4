"""A whole answer is the stream, collected."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from nanoinfer.v1 import gateway_pb2

from nanoinfer_gateway.core.completions import Update

Response = TypeVar(
    "Response", gateway_pb2.GatewayServiceGenerateResponse, gateway_pb2.GatewayServiceChatResponse
)


async def collect(updates: AsyncGenerator[Update, None], response: Response) -> Response:
    """Read all updates into the response: one choice an index, in order."""
    texts: dict[int, list[str]] = {}
    choices: dict[int, gateway_pb2.Choice] = {}

    def choice(index: int) -> gateway_pb2.Choice:
        return choices.setdefault(index, gateway_pb2.Choice(index=index))

    async with aclosing(updates):
        async for update in updates:
            if update.prompt_info is not None:
                response.prompt_info.CopyFrom(update.prompt_info)
            for delta in update.deltas:
                texts.setdefault(delta.index, []).append(delta.text)
                choice(delta.index).token_ids.extend(delta.token_ids)
                choice(delta.index).logprobs.extend(delta.logprobs)
            for finish in update.finishes:
                choice(finish.index).finish.CopyFrom(finish)
            if update.summary is not None:
                response.summary.CopyFrom(update.summary)
    for index in sorted(choices):
        choices[index].text = "".join(texts.get(index, ()))
        response.choices.append(choices[index])
    return response
