"""What the services really offer: settings by environment, and metrics by scraping."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterable, Mapping
from unittest import mock

import grpc
from nanoinfer.v1 import gateway_pb2, gateway_pb2_grpc, generation_pb2
from nanoinfer_common.config import ENV_PREFIX, ServiceSettings
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_gateway.settings import GatewaySettings
from nanoinfer_tokenizer.settings import TokenizerSettings
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.stack import Service, Stack

SETTINGS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "tokenizer": TokenizerSettings,
    "engine": EngineSettings,
}


def settings_of(service: str, environment: Mapping[str, str]) -> ServiceSettings:
    """The service's settings as that environment makes them; unknown names are an error."""
    ours = {name: value for name, value in environment.items() if name.startswith(ENV_PREFIX)}
    for name in ours:
        field = name.removeprefix(ENV_PREFIX).lower()
        assert field in SETTINGS[service].model_fields, f"{service} has no setting {field}"
    with mock.patch.dict(os.environ, ours, clear=True):
        return SETTINGS[service]()


def generate_once(stack: Stack) -> None:
    """One short generation through all three services."""
    options = gateway_pb2.GenerationOptions(stopping=generation_pb2.StoppingParams(max_tokens=4))
    request = gateway_pb2.GatewayServiceGenerateStreamRequest(text="What is", options=options)
    with grpc.insecure_channel(stack.gateway.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        assert list(stub.GenerateStream(request, timeout=60))


def scrape_all(stack: Stack) -> dict[str, str]:
    """Each service's /metrics now."""
    running = {"gateway": stack.gateway, "tokenizer": stack.tokenizer, "engine": stack.engine}
    return {name: _scrape(service) for name, service in running.items()}


def _scrape(service: Service) -> str:
    match = re.search(r'"metrics_port": ?(\d+)', service.logged('"metrics_port":'))
    assert match, service.log.read_text()
    address = f"http://127.0.0.1:{match[1]}/metrics"
    with urllib.request.urlopen(address, timeout=60) as response:
        return str(response.read().decode())


def metric_names(scraped: Iterable[str]) -> dict[str, set[str]]:
    """Every series name with the names of its labels."""
    found: dict[str, set[str]] = {}
    for text in scraped:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Every `name{label="value"}` of an expression; each metric in our queries has a selector."""
    return [
        (name, dict(_MATCHER.findall(matchers))) for name, matchers in _SELECTOR.findall(expression)
    ]
