"""Variables that look like settings: all are known, and a misspelt one is told with the nearest."""

from pathlib import Path

import pytest
from nanoinfer_common.config import ServiceSettings
from nanoinfer_common.variables import SETTINGS, unknown_variables
from nanoinfer_engine.server.settings import EngineSettings
from nanoinfer_gateway.settings import GatewaySettings
from nanoinfer_tokenizer.settings import TokenizerSettings

from tests.common.test_lifecycle import start_process


def test_the_list_holds_every_setting_of_every_service() -> None:
    kinds: list[type[ServiceSettings]] = [GatewaySettings, TokenizerSettings, EngineSettings]
    assert {name for kind in kinds for name in kind.model_fields} == SETTINGS


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NANOINFER_PROT", "NANOINFER_PROT is no setting; did you mean NANOINFER_PORT?"),
        (
            "NANOINFER_MAX_MODEL_LENGTH",
            "NANOINFER_MAX_MODEL_LENGTH is no setting; did you mean NANOINFER_MAX_MODEL_LEN?",
        ),
        (
            "NANOINFER_KV_CACHE_MEM",
            "NANOINFER_KV_CACHE_MEM is no setting; did you mean NANOINFER_KV_CACHE_MEMORY?",
        ),
        ("nanoinfer_modle", "nanoinfer_modle is no setting; did you mean NANOINFER_MODEL?"),
        ("NANOINFER_", "NANOINFER_ is no setting"),
        ("NANOINFER_XYZZY", "NANOINFER_XYZZY is no setting"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_nearest(name: str, told: str) -> None:
    assert list(unknown_variables({name: "x"})) == [told]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NANOINFER_PORT", "1"),
        ("nanoinfer_port", "1"),
        ("NANOINFER_CONFIG", "file"),
        ("NANOINFER_TARGET", "host:1"),
        ("OTHER_PROT", "x"),
        # what Kubernetes sets for a Service `nanoinfer-gateway`
        ("NANOINFER_GATEWAY_SERVICE_HOST", "10.0.0.1"),
        ("NANOINFER_GATEWAY_SERVICE_PORT", "50051"),
        ("NANOINFER_GATEWAY_SERVICE_PORT_GRPC", "50051"),
        ("NANOINFER_GATEWAY_PORT", "tcp://10.0.0.1:50051"),
        ("NANOINFER_GATEWAY_PORT_50051_TCP", "tcp://10.0.0.1:50051"),
        ("NANOINFER_GATEWAY_PORT_50051_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_settings_and_what_a_cluster_sets_are_not_told(name: str, value: str) -> None:
    assert list(unknown_variables({name: value})) == []


async def test_a_service_warns_of_it_and_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOINFER_DRAIN_SECOND", "0.1")
    async with start_process(tmp_path, "--drain-seconds", "0.2") as probe:
        await probe.become("readiness", "SERVING")
        probe.terminate()
        code, log = await probe.end(120)
    (warning,) = [entry for entry in log if entry["level"] == "warning"]
    assert code == 0
    assert "did you mean NANOINFER_DRAIN_SECONDS?" in warning["variable"]
