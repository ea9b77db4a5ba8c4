"""`/metrics` on a port and threads of its own, and histogram buckets.

A scrape reads what the service last wrote into its registry; it never waits for the event loop or
a step. Text 0.0.4 is the default form and keeps colons in names; OpenMetrics is served on request.
"""

import contextlib
import errno
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

# Scrapes take milliseconds: of many connections the oldest are those that stand still.
MAX_CONNECTIONS: Final = 16
# From the connection to the answer's last byte.
SCRAPE_SECONDS: Final = 10.0
# Without a free descriptor a connection stays in the queue of the port, which then looks ready.
ACCEPT_PAUSE_SECONDS: Final = 0.1

# Boundaries in seconds, those of vLLM, so that its dashboards work.
TIME_TO_FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
RPC_BUCKETS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)

_NO_SUCH_ADDRESS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

log = structlog.get_logger(__name__)


def token_buckets(max_tokens: int) -> tuple[float, ...]:
    """Returns the 1-2-5 series up to `max_tokens`, which ends it."""
    series = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return (*(float(bound) for bound in series if bound < max_tokens), float(max_tokens))


def bounded_label(value: str, known: Container[str]) -> str:
    """Returns `value` where it is known, else `other`: clients must not create series."""
    return value if value in known else "other"


class MetricsServer:
    """Serves a registry over HTTP from threads of its own until `close`, where gRPC would listen.

    At most `MAX_CONNECTIONS` are open; one more closes the oldest. None is open for more than
    `SCRAPE_SECONDS`. OSError: the port is taken or the host unknown.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._connections = _Connections()
        self._servers: list[_Server] = []
        app = make_wsgi_app(registry)
        try:
            for listener in _listeners(host, port):
                self._servers.append(_Server(listener, app, self._connections))
        except OSError:
            self._close_ports()
            raise
        self._threads = [
            threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()

    @property
    def port(self) -> int:
        """The port that is listened on, also where 0 was asked for."""
        return self._servers[0].server_port

    def close(self) -> None:
        """Closes the port and every connection, and ends the threads."""
        for server in self._servers:
            server.shutdown()
        self._close_ports()
        self._connections.close()
        for thread in self._threads:
            thread.join()

    def _close_ports(self) -> None:
        for server in self._servers:
            server.server_close()


def _listeners(host: str, port: int) -> Iterator[socket.socket]:
    """Opens a port at each address of `host`, the same number at all.

    As gRPC does it: an address that stands for all is IPv4 and IPv6, and `localhost` is both.
    """
    families = {4: socket.AF_INET, 6: socket.AF_INET6}
    if _is_wildcard(host) and socket.has_dualstack_ipv6():
        yield socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    hosts = ["127.0.0.1", "::1"] if host == "localhost" else [str(each[4][0]) for each in found]
    num_opened = 0
    for each in dict.fromkeys(hosts):
        family = families[ipaddress.ip_address(each.partition("%")[0]).version]
        try:
            listener = socket.create_server((each, port), family=family)
        except OSError as error:
            # A family that this machine lacks is no failure as long as there is another.
            if error.errno not in _NO_SUCH_ADDRESS or (each == hosts[-1] and not num_opened):
                raise
            continue
        num_opened += 1
        port = listener.getsockname()[1]
        yield listener


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


class _Connections:
    """The open connections, oldest first, and the threads that answer them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="metrics")
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}

    def answer(self, connection: socket.socket, answer: Callable[[], None]) -> None:
        """Runs `answer` in a thread; shuts the oldest connection down where there are too many."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                self._shut(next(iter(self._open)))
            self._open[connection] = time.monotonic()
        self._threads.submit(answer)

    def shut_late_ones(self) -> None:
        """Shuts down what has been open for too long, so that its thread's next call fails."""
        with self._lock:
            limit = time.monotonic() - SCRAPE_SECONDS
            for connection in [each for each, since in self._open.items() if since < limit]:
                self._shut(connection)

    def forget(self, connection: socket.socket) -> None:
        """Leaves a connection to its thread, which is about to close it."""
        with self._lock:
            self._open.pop(connection, None)

    def close(self) -> None:
        """Shuts every connection down and ends the threads."""
        with self._lock:
            for connection in list(self._open):
                self._shut(connection)
        self._threads.shutdown()

    def _shut(self, connection: socket.socket) -> None:
        del self._open[connection]
        with contextlib.suppress(OSError):  # the client has gone already
            connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Leaves a scrape, every few seconds for ever, out of the log."""


class _Server(WSGIServer):
    """One listening port; its connections are answered in the threads of `connections`."""

    def __init__(self, listener: socket.socket, app: Any, connections: _Connections) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        # Not by `server_bind`, which asks the name service for the host's name and may wait long.
        self.server_name, self.server_port = listener.getsockname()[:2]
        self.setup_environ()
        self.set_app(app)
        self._connections = connections

    def get_request(self) -> tuple[Any, Any]:
        """Takes a connection; without a free descriptor pauses before that is tried again."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(ACCEPT_PAUSE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Has the connection answered in a thread."""
        self._connections.answer(request, lambda: self._answer(request, client_address))

    def _answer(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception as error:
            log.debug("a scrape failed", error=repr(error))
        finally:
            self._connections.forget(request)
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Is called about twice a second."""
        self._connections.shut_late_ones()
