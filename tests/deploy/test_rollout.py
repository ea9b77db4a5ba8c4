"""A rolling update loses no request: a second replica starts, the first one gets SIGTERM.

Real processes under steady load of 200 streams, with the manifests' drain delay. Harder than in a
cluster: there is no preStop sleep, and clients keep being told both addresses, so that only health
and refusals steer them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.deploy.load import Load, Switch, running_load
from tests.deploy.rendering import K8S, environment
from tests.e2e.conftest import GUIDE
from tests.e2e.stack import Service, start_service

NUM_STREAMS = 200
MAX_TOKENS = 24
FLAGS = {
    "nanoinfer_engine": ["--model", str(GUIDE), "--threads", "1", "--max-batch-requests", "256"],
    "nanoinfer_tokenizer": ["--model", str(GUIDE)],
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@dataclass
class Fleet:
    """Starts replicas on ports that their clients knew before."""

    directory: Path
    cleanup: ExitStack

    def start(self, module: str, port: int, *flags: str) -> Service:
        arguments = ["--port", str(port), *FLAGS.get(module, []), *flags]
        delay = drain_delay(module.removeprefix("nanoinfer_"))
        drain = {"NANOINFER_DRAIN_DELAY_SECONDS": delay, "NANOINFER_DRAIN_SECONDS": "60"}
        context = start_service(module, arguments, self.directory, drain, ready=False)
        return self.cleanup.enter_context(context)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as cleanup:
        yield Fleet(tmp_path, cleanup)


def drain_delay(service: str) -> str:
    """What the base manifest says."""
    documents = yaml.safe_load_all((K8S / "base" / f"{service}.yaml").read_text())
    (deployment,) = [document for document in documents if document["kind"] == "Deployment"]
    return environment(deployment)["NANOINFER_DRAIN_DELAY_SECONDS"]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def addresses(ports: list[int]) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in ports)


@contextmanager
def replaced(load: Load, old: Service, new: Service) -> Iterator[None]:
    """Rolls from `old` to `new` with every stream in flight; then the load must still flow."""
    new.await_ready()
    load.await_completed(NUM_STREAMS // 4)
    load.await_flowing(NUM_STREAMS // 2)
    old.terminate()
    yield
    assert old.wait(90) == 0
    load.await_completed(NUM_STREAMS)


def rolled(module: str, fleet: Fleet) -> Load:
    """Replaces one service of a stack under load."""
    engines, tokenizers, gateways = (free_ports(2) for _ in range(3))
    upstreams = ["--tokenizer", addresses(tokenizers), "--engine", addresses(engines)]
    ports = {
        "nanoinfer_engine": engines,
        "nanoinfer_tokenizer": tokenizers,
        "nanoinfer_gateway": gateways,
    }
    flags = {"nanoinfer_gateway": upstreams}
    first = {name: fleet.start(name, both[0], *flags.get(name, [])) for name, both in ports.items()}
    for service in first.values():
        service.await_ready()
    with running_load(f"ipv4:{addresses(gateways)}", NUM_STREAMS, MAX_TOKENS) as load:
        second = fleet.start(module, ports[module][1], *flags.get(module, []))
        with replaced(load, first[module], second):
            pass
    return load


@pytest.mark.matrix("R64")
@pytest.mark.parametrize("module", ["nanoinfer_engine", "nanoinfer_tokenizer", "nanoinfer_gateway"])
def test_a_rolling_update_fails_no_stream(module: str, fleet: Fleet) -> None:
    load = rolled(module, fleet)
    assert load.failures == []
    assert load.completed >= NUM_STREAMS * 1.25


def test_clients_behind_one_address_move_on(fleet: Fleet) -> None:
    """A virtual IP keeps connections where they are: the leaving gateway must send clients away."""
    engine, tokenizer, *gateways = free_ports(4)
    first = [fleet.start("nanoinfer_engine", engine), fleet.start("nanoinfer_tokenizer", tokenizer)]
    upstreams = ["--tokenizer", addresses([tokenizer]), "--engine", addresses([engine])]
    old = fleet.start("nanoinfer_gateway", gateways[0], *upstreams)
    for service in (*first, old):
        service.await_ready()
    with (
        Switch(old.address) as switch,
        running_load(switch.address, NUM_STREAMS, MAX_TOKENS) as load,
    ):
        new = fleet.start("nanoinfer_gateway", gateways[1], *upstreams)
        new.await_ready()
        switch.upstream = new.address
        connections = switch.num_connections
        with replaced(load, old, new):
            # Clients are on their new connections while old streams still finish on the old ones.
            end = time.monotonic() + 60
            while switch.num_connections == connections:
                assert time.monotonic() < end, "nobody was sent away"
                time.sleep(0.01)
            assert old.process.poll() is None
    assert load.failures == []
