"""NanoInfer: client library and command line.

The names below are loaded on first use, so that importing the stubs (`nanoinfer.v1`) costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoinfer.aio import AsyncClient as AsyncClient
    from nanoinfer.client import Client as Client
    from nanoinfer.errors import Cancelled as Cancelled
    from nanoinfer.errors import DeadlineExceeded as DeadlineExceeded
    from nanoinfer.errors import InvalidRequest as InvalidRequest
    from nanoinfer.errors import NanoInferError as NanoInferError
    from nanoinfer.errors import NotFound as NotFound
    from nanoinfer.errors import Overloaded as Overloaded
    from nanoinfer.errors import PermissionDenied as PermissionDenied
    from nanoinfer.errors import PreconditionFailed as PreconditionFailed
    from nanoinfer.errors import ServerError as ServerError
    from nanoinfer.errors import TooLarge as TooLarge
    from nanoinfer.errors import Unavailable as Unavailable
    from nanoinfer.errors import Unsupported as Unsupported
    from nanoinfer.errors import Violation as Violation
    from nanoinfer.options import CallOptions as CallOptions
    from nanoinfer.options import Message as Message
    from nanoinfer.options import Options as Options
    from nanoinfer.results import Choice as Choice
    from nanoinfer.results import Completion as Completion
    from nanoinfer.results import Delta as Delta
    from nanoinfer.results import Timings as Timings
    from nanoinfer.results import TokenLogprob as TokenLogprob
    from nanoinfer.results import Usage as Usage
    from nanoinfer.streams import AsyncStream as AsyncStream
    from nanoinfer.streams import Stream as Stream
    from nanoinfer.v1.generation_pb2 import ModelInfo as ModelInfo
    from nanoinfer.v1.generation_pb2 import ServerInfo as ServerInfo

_MODULES = {
    "aio": "AsyncClient",
    "client": "Client",
    "errors": "Cancelled DeadlineExceeded InvalidRequest NanoInferError NotFound Overloaded "
    "PermissionDenied PreconditionFailed ServerError TooLarge Unavailable Unsupported Violation",
    "options": "CallOptions Message Options",
    "results": "Choice Completion Delta Timings TokenLogprob Usage",
    "streams": "AsyncStream Stream",
    "v1.generation_pb2": "ModelInfo ServerInfo",
}
_ORIGINS = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_ORIGINS)


def __getattr__(name: str) -> object:
    if name not in _ORIGINS:
        raise AttributeError(f"module 'nanoinfer' has no attribute {name!r}")
    value: object = getattr(import_module(f"nanoinfer.{_ORIGINS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
