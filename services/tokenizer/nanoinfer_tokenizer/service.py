"""The tokenizer's RPCs: proto to core and back."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc
import structlog
from nanoinfer.v1 import tokenizer_pb2 as pb
from nanoinfer.v1 import tokenizer_pb2_grpc
from nanoinfer.v1.generation_pb2 import TokenIds
from nanoinfer_common import errors, names, telemetry
from nanoinfer_common.errors import ServiceError, StartError, Violation
from nanoinfer_common.status import ServiceStatus
from nanoinfer_common.validation import validate_messages

from nanoinfer_tokenizer import checks
from nanoinfer_tokenizer.chat import ChatRenderer, Message, RenderedChat
from nanoinfer_tokenizer.encodings import (
    Frame,
    TokenizerFileError,
    UnknownTokenIdError,
    encode_with_control,
)
from nanoinfer_tokenizer.served import Served, load_served
from nanoinfer_tokenizer.settings import TokenizerSettings
from nanoinfer_tokenizer.streaming import StreamDecoder
from nanoinfer_tokenizer.template_process import TemplateRefusedError, TemplateTimeoutError
from nanoinfer_tokenizer.work import Metrics, WorkPool

_VOCABULARY_RUN = 16_384  # tokens in one message of GetVocabulary: a few hundred KiB
_DECODE_RUN = 4096  # ids decoded in one go: less than a millisecond
_MESSAGE_CHARACTERS = 16  # a message takes as long to render as so many characters to encode

# grpc-stubs leave the context's type parameters to the reader.
Context: TypeAlias = Any

log = structlog.get_logger(__name__)


class TokenizerService(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Serves one model's tokenizer."""

    name = "nanoinfer-tokenizer"
    full_name = "nanoinfer.v1.TokenizerService"

    def __init__(self, settings: TokenizerSettings, status: ServiceStatus) -> None:
        """Remembers what to serve; `start` loads it."""
        self._settings = settings
        self._status = status
        self._metrics = Metrics()
        self.registry = self._metrics.registry
        bound = settings.max_pending
        self._coding = WorkPool(settings.num_threads, bound, self._metrics)
        # Apart, so that slow templates hold nobody else up.
        self._rendering = WorkPool(settings.num_template_workers, bound, self._metrics)
        self._loaded: Served | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the handlers."""
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Loads the tokenizer and its chat template. Raises `StartError` where it cannot."""
        try:
            loaded = self._loaded = await asyncio.to_thread(load_served, self._settings)
        except TokenizerFileError as error:
            source = self._settings.tokenizer or self._settings.model
            raise StartError(f"tokenizer of {source}: {error}") from error
        info = loaded.encoding.info
        log.info(
            "tokenizer", tokenizer=loaded.tokenizer.name, backend=info.backend, reason=info.reason
        )

    async def drain(self, seconds: float) -> None:
        """Has nothing to do: the server waits for running calls, and no work outlives its call."""

    async def stop(self) -> None:
        """Ends threads and template processes."""
        await asyncio.to_thread(self._coding.close)
        await asyncio.to_thread(self._rendering.close)
        if self._loaded is not None and self._loaded.chat is not None:
            await asyncio.to_thread(self._loaded.chat.close)

    async def Encode(
        self, request: pb.TokenizerServiceEncodeRequest, context: Context
    ) -> pb.TokenizerServiceEncodeResponse:
        """Encodes one text."""
        checks.check_text(request.text, self._settings.max_characters)
        (token_ids,) = await self._encode([request.text], request)
        return pb.TokenizerServiceEncodeResponse(
            tokens=TokenIds(ids=token_ids), tokenizer_fingerprint=self._served.fingerprint
        )

    async def EncodeBatch(
        self, request: pb.TokenizerServiceEncodeBatchRequest, context: Context
    ) -> pb.TokenizerServiceEncodeBatchResponse:
        """Encodes several texts."""
        settings = self._settings
        checks.check_texts(request.texts, settings.max_batch_texts, settings.max_characters)
        encoded = await self._encode(list(request.texts), request)
        return pb.TokenizerServiceEncodeBatchResponse(
            tokens=[TokenIds(ids=token_ids) for token_ids in encoded],
            tokenizer_fingerprint=self._served.fingerprint,
        )

    async def RenderChat(
        self, request: pb.TokenizerServiceRenderChatRequest, context: Context
    ) -> pb.TokenizerServiceRenderChatResponse:
        """Renders a conversation and encodes it."""
        if self._served.chat is None:
            raise errors.precondition(names.NO_CHAT_TEMPLATE, "the model has no chat template")
        validate_messages(request.messages)
        messages = [
            Message(message.role, "".join(part.text for part in message.content))
            for message in request.messages
        ]
        add_prompt = checks.given_or(request, "add_generation_prompt", True)
        rendered = await self._render(self._served.chat, messages, add_prompt)

        def encode() -> tuple[list[int], str | None]:
            token_ids = self._encode_rendered(rendered)
            return token_ids, rendered.text if request.return_text else None

        token_ids, text = await self._coding.run(encode, len(rendered.guarded))
        return pb.TokenizerServiceRenderChatResponse(
            tokens=TokenIds(ids=token_ids),
            tokenizer_fingerprint=self._served.fingerprint,
            text=text,
        )

    async def Decode(
        self, request: pb.TokenizerServiceDecodeRequest, context: Context
    ) -> pb.TokenizerServiceDecodeResponse:
        """Decodes ids."""
        token_ids = checks.check_token_ids(request.tokens, self._settings.max_characters)
        skip_special = checks.given_or(request, "skip_special_tokens", True)
        decoder = StreamDecoder(self._served.vocabulary, skip_special=skip_special)
        text = await _decode(decoder, token_ids)
        return pb.TokenizerServiceDecodeResponse(text=text + decoder.finish())

    async def DecodeStream(
        self,
        request_iterator: AsyncIterator[pb.TokenizerServiceDecodeStreamRequest],
        context: Context,
    ) -> AsyncIterator[pb.TokenizerServiceDecodeStreamResponse]:
        """Decodes ids as they come."""
        decoder: StreamDecoder | None = None
        skip_special = True
        with self._metrics.decode_streams.track_inprogress():
            async for request in request_iterator:
                wanted = checks.given_or(request, "skip_special_tokens", skip_special)
                if decoder is None:
                    skip_special = wanted
                    decoder = StreamDecoder(self._served.vocabulary, skip_special=skip_special)
                elif wanted != skip_special:
                    violation = Violation("skip_special_tokens", "the first message's value")
                    raise errors.invalid(names.INVALID_REQUEST, "changed in the stream", violation)
                token_ids = checks.check_token_ids(request.tokens, self._settings.max_characters)
                text = await _decode(decoder, token_ids)
                yield pb.TokenizerServiceDecodeStreamResponse(text=text)
            if decoder is not None and (rest := decoder.finish()):
                yield pb.TokenizerServiceDecodeStreamResponse(text=rest)

    async def GetVocabulary(
        self, request: pb.TokenizerServiceGetVocabularyRequest, context: Context
    ) -> AsyncIterator[pb.TokenizerServiceGetVocabularyResponse]:
        """Streams the vocabulary in runs of consecutive ids."""
        special, spelling = self._served.vocabulary.special, self._served.vocabulary.spelling
        tokens, first_tokens = spelling.tokens, spelling.first_tokens
        eos = TokenIds(ids=self._served.tokenizer.eos_token_ids)
        for first in range(0, len(tokens), _VOCABULARY_RUN):
            run = tokens[first : first + _VOCABULARY_RUN]
            ids = range(first, first + len(run))
            yield pb.TokenizerServiceGetVocabularyResponse(
                first_token_id=first,
                tokens=run,
                special_token_ids=[i for i in ids if i in special],
                vocab_size=len(tokens),
                tokenizer_fingerprint=self._served.fingerprint,
                eos_token_ids=eos,
                byte_token_ids=[i for i in ids if i in spelling.byte_ids],
                first_tokens={i: first_tokens[i] for i in ids if i in first_tokens},
                strip_leading_spaces=spelling.strip_leading_spaces,
            )

    async def GetTokenizerInfo(
        self, request: pb.TokenizerServiceGetTokenizerInfoRequest, context: Context
    ) -> pb.TokenizerServiceGetTokenizerInfoResponse:
        """Describes the tokenizer."""
        served = self._served
        return pb.TokenizerServiceGetTokenizerInfoResponse(
            name=served.tokenizer.name,
            vocab_size=len(served.vocabulary.spelling.tokens),
            special_tokens=served.vocabulary.special,
            eos_token_ids=served.tokenizer.eos_token_ids,
            max_characters=self._settings.max_characters,
            max_batch_texts=self._settings.max_batch_texts,
            tokenizer_fingerprint=served.fingerprint,
            has_chat_template=served.chat is not None,
            backend=served.encoding.info.backend,
        )

    async def GetServerInfo(
        self, request: pb.TokenizerServiceGetServerInfoRequest, context: Context
    ) -> pb.TokenizerServiceGetServerInfoResponse:
        """Describes the server."""
        return pb.TokenizerServiceGetServerInfoResponse(server=self._status.info())

    @property
    def _served(self) -> Served:
        if self._loaded is None:
            raise errors.unavailable(names.LOADING, "loading")
        return self._loaded

    async def _encode(
        self,
        texts: Sequence[str],
        request: pb.TokenizerServiceEncodeRequest | pb.TokenizerServiceEncodeBatchRequest,
    ) -> list[list[int]]:
        num_characters = sum(map(len, texts))
        telemetry.set_attributes({"nanoinfer.prompt.chars": num_characters})
        tokenizer = self._served.tokenizer
        framed = checks.given_or(request, "add_special_tokens", True)
        frame = tokenizer.frame if framed else Frame()
        to_ids = tokenizer.encoding.encode
        if request.parse_special_tokens:
            to_ids = partial(encode_with_control, tokenizer.encoding)

        def encode(text: str) -> list[int]:
            return frame.around(to_ids(text))

        works = (partial(self._measure, partial(encode, text)) for text in texts)
        return await self._coding.run_all(works, num_characters)

    async def _render(
        self, chat: ChatRenderer, messages: Sequence[Message], add_generation_prompt: bool
    ) -> RenderedChat:
        num_characters = sum(len(message.content) for message in messages)
        checks.check_size("messages", "characters", num_characters, self._settings.max_characters)
        attributes = {"nanoinfer.prompt.chars": num_characters}
        telemetry.set_attributes(attributes)
        with telemetry.tracer().start_as_current_span(
            "render_prompt", attributes=attributes, record_exception=False
        ):
            try:
                return await self._rendering.run(
                    partial(chat.render, messages, add_generation_prompt=add_generation_prompt),
                    num_characters + _MESSAGE_CHARACTERS * len(messages),
                )
            except TemplateRefusedError as error:
                violation = Violation("messages", str(error))
                message = "the chat template refused the messages"
                raise errors.invalid(names.INVALID_MESSAGES, message, violation) from error
            except TemplateTimeoutError as error:
                log.error("chat template stopped", error=str(error))
                message = "the chat template ran for too long or produced too much"
                raise ServiceError(
                    grpc.StatusCode.INTERNAL, names.TEMPLATE_TIMEOUT, message
                ) from error

    def _encode_rendered(self, rendered: RenderedChat) -> list[int]:
        encoding = self._served.encoding
        return self._measure(
            partial(encode_with_control, encoding, rendered.guarded, rendered.restore)
        )

    def _measure(self, encode: Callable[[], list[int]]) -> list[int]:
        start = time.perf_counter()
        token_ids = encode()
        self._metrics.encode.observe(time.perf_counter() - start)
        self._metrics.encoded_tokens.inc(len(token_ids))
        return token_ids


async def _decode(decoder: StreamDecoder, token_ids: Sequence[int]) -> str:
    """Decodes here, because looking bytes up costs less than a thread; long runs let others in.

    So a full queue never ends a stream that was admitted.
    """
    text: list[str] = []
    try:
        for start in range(0, len(token_ids), _DECODE_RUN):
            text.append(decoder.push(token_ids[start : start + _DECODE_RUN]))
            await asyncio.sleep(0)
    except UnknownTokenIdError as error:
        violation = Violation("tokens.ids", str(error))
        raise errors.invalid(names.INVALID_TOKEN_IDS, str(error), violation) from error
    return "".join(text)
