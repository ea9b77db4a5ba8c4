"""The public names, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import nanoinfer
import pytest

PUBLIC = [
    "AsyncClient",
    "AsyncStream",
    "CallOptions",
    "Cancelled",
    "Choice",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "InvalidRequest",
    "Message",
    "ModelInfo",
    "NanoInferError",
    "NotFound",
    "Options",
    "Overloaded",
    "PermissionDenied",
    "PreconditionFailed",
    "ServerError",
    "ServerInfo",
    "Stream",
    "Timings",
    "TokenLogprob",
    "TooLarge",
    "Unavailable",
    "Unsupported",
    "Usage",
    "Violation",
]


def test_the_public_names() -> None:
    assert nanoinfer.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(nanoinfer, name).__name__ == name
    assert set(PUBLIC) <= set(dir(nanoinfer))


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = nanoinfer.Nothing


def loaded(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(output.stdout.split())


def test_stubs_load_no_client_and_the_client_no_sdk() -> None:
    stubs = loaded("from nanoinfer.v1 import generation_pb2")
    assert "nanoinfer.client" not in stubs
    assert "grpc" not in stubs
    client = loaded("from nanoinfer import Client, AsyncClient")
    for package in ("opentelemetry.sdk", "typer", "rich", "tiktoken", "torch", "pydantic"):
        assert package not in client, package
