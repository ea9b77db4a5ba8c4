"""Channels to the services, set up as the contract says.

Retries: UNAVAILABLE only, only before response headers, never for the engine, whose callers pick
another replica themselves.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import grpc

from nanoinfer_common.interceptors import client_interceptors

MAX_RECEIVE_BYTES: Final = 8 * 1024 * 1024
KEEPALIVE_MILLISECONDS: Final = 60_000
KEEPALIVE_TIMEOUT_MILLISECONDS: Final = 20_000
TOKENIZER_UNARY_SECONDS: Final = 5.0

_TOKENIZER: Final = "nanoinfer.v1.TokenizerService"


def open_channel(address: str, *, round_robin: bool = False) -> grpc.aio.Channel:
    """Opens a plaintext aio channel; the caller closes it.

    With `round_robin`, calls spread over all addresses behind `address` (`dns:///host:port`,
    `ipv4:a:1,b:2`) that report SERVING; without it, one connection serves all calls.
    """
    options = [
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MILLISECONDS),
        ("grpc.keepalive_permit_without_calls", 0),
        # A service that restarted is found again within a second, one that is gone is not hammered.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.service_config", json.dumps(service_config(round_robin))),
    ]
    interceptors = [cast(grpc.aio.ClientInterceptor, _TokenizerTimeout())]
    interceptors += client_interceptors(address)
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)


def service_config(round_robin: bool = False) -> dict[str, Any]:
    """Returns the gRPC service config: retries, load balancing, health checks."""
    config: dict[str, Any] = {
        "methodConfig": [
            {
                "name": [{"service": "nanoinfer.v1.GatewayService"}],
                "waitForReady": True,
                "retryPolicy": _retry_policy(3, "0.1s", "2s"),
            },
            {
                "name": [{"service": _TOKENIZER}],
                "retryPolicy": _retry_policy(4, "0.05s", "1s"),
            },
        ],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }
    if round_robin:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        config["healthCheckConfig"] = {"serviceName": ""}
    return config


class _TokenizerTimeout(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Bounds unary tokenizer calls to 5 s, retries included.

    Not by the service config's `timeout`, which ends calls up to 2 s too early (grpc#34547,
    grpc#40633: "2s" fired after 0.24 s) and which servers do not get to see.
    """

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        details = client_call_details
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        if method.startswith(f"/{_TOKENIZER}/"):
            given = details.timeout
            seconds = TOKENIZER_UNARY_SECONDS
            details = grpc.aio.ClientCallDetails(
                details.method,
                seconds if given is None else min(given, seconds),
                details.metadata,
                details.credentials,
                details.wait_for_ready,
            )
        return await continuation(details, request)


def _retry_policy(
    attempts: int, initial: str, longest: str
) -> Mapping[str, int | str | Sequence[str]]:
    return {
        "maxAttempts": attempts,
        "initialBackoff": initial,
        "maxBackoff": longest,
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
