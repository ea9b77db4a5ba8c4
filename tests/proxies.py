"""A proxy that counts connections and answers none, for tests of channels that use no proxy."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.conftest import PROXIES


@dataclass
class CountingProxy:
    """Where a proxy would be; `requests` are the first lines that came."""

    address: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def counting_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingProxy]:
    """Points every proxy variable at a socket that refuses what it is asked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = CountingProxy(f"127.0.0.1:{server.getsockname()[1]}")

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed: the test is over
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(10)
                    proxy.requests.append(connection.recv(4096).split(b"\r\n")[0].decode())
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        for name in PROXIES[:3]:
            monkeypatch.setenv(name, f"http://{proxy.address}")
        try:
            yield proxy
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
