"""`grpc.health.v1` without its package: asks a server whether a name is serving.

HealthCheckRequest has one string field 1 and HealthCheckResponse one enum field 1, exactly the wire
form of the well-known wrappers used here.
"""

import re
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from nanoinfer.errors import Unavailable

CHECK = "/grpc.health.v1.Health/Check"
READINESS = "readiness"
POLL_SECONDS = 0.1
PROBE_SECONDS = 1.0  # for the cause, which a channel that could not connect has at hand
STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
# a server without the health service, or without the name, answers and so is reachable
ANSWERED = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND)


def proxy_options(use_proxy: bool) -> list[tuple[str, int]]:
    """Channel options that say whether the environment's proxy is used, for loopback too."""
    return [("grpc.enable_http_proxy", int(use_proxy))]


def method(channel: Any) -> Any:
    """The call that takes a health name and returns the name of its status, of either transport."""
    return channel.unary_unary(CHECK, _serialize, _deserialize)


def check(target: str, service: str, timeout: float, *, use_proxy: bool = False) -> str:
    """The status of a health name at `target`, or the name of the gRPC code that came instead."""
    with grpc.insecure_channel(target, proxy_options(use_proxy)) as channel:
        try:
            return str(method(channel)(service, timeout=timeout))
        except grpc.RpcError as error:
            return error.code().name


def cause(error: Any) -> str:
    """Why a server could not be reached, as gRPC tells it."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer; a firewall drops the packets, or what listens there does not speak gRPC"
    text = str(error.details() or error.code().name).rpartition("last error: ")[2]
    return re.sub(r"^[A-Z_]+: ", "", text)


def not_ready(target: str, timeout: float, status: str) -> Unavailable:
    """What waiting for a server in vain raises."""
    message = f"{target} was not ready within {timeout:g} s ({status})"
    return Unavailable(message, code=grpc.StatusCode.UNAVAILABLE, reason="NOT_READY")


def _serialize(service: str) -> bytes:
    return StringValue(value=service).SerializeToString()


def _deserialize(data: bytes) -> str:
    value = Int32Value.FromString(data).value
    return STATUSES[value] if 0 <= value < len(STATUSES) else "UNKNOWN"
