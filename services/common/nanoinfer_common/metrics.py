"""`/metrics` on a port and thread of its own, and histogram buckets.

A scrape reads what the service last wrote into its registry; it never waits for the event loop or
a step. Text 0.0.4 is the default form and keeps colons in names; OpenMetrics is served on request.
"""

from collections.abc import Container
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server

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


def token_buckets(max_tokens: int) -> tuple[float, ...]:
    """Returns the 1-2-5 series up to `max_tokens`, which ends it."""
    series = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return (*(float(bound) for bound in series if bound < max_tokens), float(max_tokens))


def bounded_label(value: str, known: Container[str]) -> str:
    """Returns `value` where it is known, else `other`: clients must not create series."""
    return value if value in known else "other"


class MetricsServer:
    """Serves a registry over HTTP from a thread until `close`. OSError: the port is taken."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)

    @property
    def port(self) -> int:
        """The port that is listened on, also where 0 was asked for."""
        return self._server.server_port

    def close(self) -> None:
        """Closes the port and ends the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
