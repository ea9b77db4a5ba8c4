"""The metrics port against clients that stand still, and where it listens."""

import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import grpc
import pytest
from nanoinfer_common import metrics
from nanoinfer_common.metrics import MetricsServer
from prometheus_client import CollectorRegistry, Gauge

PATIENCE = 60.0


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("answer", "The answer.", registry=registry).set(42)
    return registry


@pytest.fixture
def server(registry: CollectorRegistry) -> Iterator[MetricsServer]:
    with closing(MetricsServer(registry, "127.0.0.1", 0)) as running:
        yield running


def scrape(port: int) -> str:
    address = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(address, timeout=PATIENCE) as response:
        return str(response.read().decode())


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=PATIENCE)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def num_threads() -> int:
    return sum(thread.name.startswith("metrics") for thread in threading.enumerate())


# --- clients that stand still ---


def test_idle_connections_keep_no_scrape_out_and_make_no_more_threads(
    server: MetricsServer,
) -> None:
    before = num_threads()
    with ExitStack() as stack:
        idle = [
            stack.enter_context(connect(server.port)) for _ in range(3 * metrics.MAX_CONNECTIONS)
        ]
        assert "answer 42.0" in scrape(server.port)
        assert num_threads() - before <= metrics.MAX_CONNECTIONS
        assert idle[0].recv(1) == b""  # the oldest had to go


def test_bytes_that_drip_do_not_keep_a_connection_open(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_SECONDS", 0.5)
    with connect(server.port) as slow:

        def drip() -> None:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                slow.sendall(b"x")
                time.sleep(0.02)

        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            drip()
    assert "answer 42.0" in scrape(server.port)


def test_a_reader_that_stands_still_gives_its_thread_back(
    registry: CollectorRegistry, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_SECONDS", 0.5)
    # More than the sockets' buffers hold, so that the answer cannot be written.
    many = Gauge("many", "x" * 1000, ["label"], registry=registry)
    for index in range(4000):
        many.labels("y" * 2000 + str(index)).set(index)
    with ExitStack() as stack:
        for _ in range(metrics.MAX_CONNECTIONS):
            slow = stack.enter_context(connect(server.port))
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        eventually(lambda: not server._connections._open)
        threads = server._connections._threads
        # All threads are free: as many tasks as there are threads meet.
        meeting = threading.Barrier(metrics.MAX_CONNECTIONS)
        met = [threads.submit(meeting.wait, PATIENCE) for _ in range(metrics.MAX_CONNECTIONS)]
        assert sorted(each.result() for each in met) == list(range(metrics.MAX_CONNECTIONS))


def test_open_connections_do_not_delay_the_end(registry: CollectorRegistry) -> None:
    server = MetricsServer(registry, "127.0.0.1", 0)
    before = num_threads()
    with connect(server.port) as idle:
        eventually(lambda: num_threads() > before)
        closer = threading.Thread(target=server.close)
        closer.start()
        closer.join(PATIENCE)
        assert not closer.is_alive()
        assert idle.recv(1) == b""
    assert num_threads() == before - 1


def test_many_scrapers_at_once_are_all_answered(server: MetricsServer) -> None:
    with ThreadPoolExecutor(8) as scrapers:
        texts = list(scrapers.map(scrape, [server.port] * 64))
    assert all("answer 42.0" in text for text in texts)


@pytest.mark.parametrize(
    "sent", [b"\r\n\r\n", b"GET\r\n\r\n", b"\xff" * 100 + b"\r\n\r\n", b"GET /" + b"x" * 70_000]
)
def test_what_is_no_request_leaves_the_port_alive(
    sent: bytes, server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server.port) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass
    assert "answer 42.0" in scrape(server.port)
    assert "Traceback" not in capfd.readouterr().err


# --- where it listens ---


def reachable(port: int) -> set[str]:
    """The loopback addresses at which something listens."""
    found = set()
    for host in ("127.0.0.1", "::1"):
        try:
            connect(port, host).close()
        except OSError:
            continue
        found.add(host)
    return found


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost", "127.0.0.1", "::1"])
def test_it_listens_where_grpc_does(host: str, registry: CollectorRegistry) -> None:
    theirs = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    try:
        port = theirs.add_insecure_port(f"[{host}]:0" if ":" in host else f"{host}:0")
    except RuntimeError:
        pytest.skip(f"this machine has no {host}")
    theirs.start()
    try:
        expected = reachable(port)
    finally:
        theirs.stop(None).wait()
    assert expected
    with closing(MetricsServer(registry, host, 0)) as ours:
        assert reachable(ours.port) == expected


def test_an_unknown_host_is_an_os_error(registry: CollectorRegistry) -> None:
    with pytest.raises(OSError, match=r"."):
        MetricsServer(registry, "does-not-exist.invalid", 0)
