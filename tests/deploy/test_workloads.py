"""What every Deployment, Service and budget must have, checked against the services' settings."""

from __future__ import annotations

from typing import Any

import pytest
from nanoinfer_common import names
from nanoinfer_common.server import ABORT_SECONDS, CLOSE_SECONDS
from nanoinfer_common.telemetry import FLUSH_SECONDS

from tests.deploy.offered import settings_of
from tests.deploy.rendering import (
    SERVICES,
    Document,
    Rendering,
    container,
    cores,
    environment,
    memory_bytes,
    pod,
)

# What the kubelet or the process needs between the last wait and the end.
MARGIN_SECONDS = 10
OTHER_VARIABLES = {"POD_NAME", "NODE_NAME"}


def all_containers(deployment: Document) -> list[Document]:
    spec = pod(deployment)
    return [*spec["containers"], *spec.get("initContainers", [])]


def labels_match(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def pod_labels(deployment: Document) -> dict[str, str]:
    labels: dict[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
    return labels


def test_selectors_find_exactly_their_own_pods(everything: list[Rendering]) -> None:
    for rendered in everything:
        deployments = rendered.of("Deployment")
        for deployment in deployments:
            selector = deployment["spec"]["selector"]["matchLabels"]
            own = [d for d in deployments if labels_match(selector, pod_labels(d))]
            assert own == [deployment]
        for service in rendered.of("Service"):
            found = [
                d for d in deployments if labels_match(service["spec"]["selector"], pod_labels(d))
            ]
            assert len(found) == 1, service["metadata"]["name"]
            ports = {p["name"] for p in container(found[0])["ports"]}
            assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports
        for budget in rendered.of("PodDisruptionBudget"):
            selector = budget["spec"]["selector"]["matchLabels"]
            assert sum(labels_match(selector, pod_labels(d)) for d in deployments) == 1
            assert budget["spec"]["maxUnavailable"] == 1
        assert rendered.names("PodDisruptionBudget") == set(SERVICES)
        for deployment in deployments:
            account = pod(deployment)["serviceAccountName"]
            assert rendered.get("ServiceAccount", account)["automountServiceAccountToken"] is False
            for constraint in pod(deployment).get("topologySpreadConstraints", []):
                assert labels_match(
                    constraint["labelSelector"]["matchLabels"], pod_labels(deployment)
                )


def test_each_service_can_be_balanced_over(everything: list[Rendering]) -> None:
    for rendered in everything:
        for name in ("gateway-headless", "tokenizer", "engine"):
            assert rendered.get("Service", name)["spec"]["clusterIP"] == "None"
        assert rendered.get("Service", "gateway")["spec"]["type"] == "ClusterIP"


def test_every_variable_is_a_setting_with_a_valid_value(everything: list[Rendering]) -> None:
    for rendered in everything:
        for name, deployment in rendered.services():
            variables = environment(deployment)
            settings_of(name, variables)
            declared = [variable["name"] for variable in container(deployment)["env"]]
            assert len(set(declared)) == len(declared), f"{rendered.name}: {name}"
            for variable in variables:
                known = variable.startswith(("NANOINFER_", "OTEL_")) or variable in OTHER_VARIABLES
                assert known, variable


def test_an_unknown_variable_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="no setting prot"):
        settings_of("gateway", {"NANOINFER_PROT": "1"})
    with pytest.raises(ValueError, match="port"):
        settings_of("gateway", {"NANOINFER_PORT": "99999"})


def test_ports_are_those_that_the_service_opens(everything: list[Rendering]) -> None:
    for rendered in everything:
        for name, deployment in rendered.services():
            settings = settings_of(name, environment(deployment))
            ports = {p["name"]: p["containerPort"] for p in container(deployment)["ports"]}
            assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
            assert settings.host == "0.0.0.0"
        for name in ("gateway", "gateway-headless", "tokenizer", "engine"):
            service = rendered.get("Service", name)
            deployment = rendered.get("Deployment", name.removesuffix("-headless"))
            port = settings_of(deployment["metadata"]["name"], environment(deployment)).port
            assert [p["port"] for p in service["spec"]["ports"]] == [port]


def test_probes_ask_different_health_names_that_exist(everything: list[Rendering]) -> None:
    for rendered in everything:
        for name, deployment in rendered.services():
            here = container(deployment)
            port = settings_of(name, environment(deployment)).port
            probes = {kind: here[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
            for probe in probes.values():
                assert probe["grpc"]["port"] == port
                assert (
                    probe["timeoutSeconds"] <= probe["periodSeconds"] or probe is probes["startup"]
                )
            assert probes["readiness"]["grpc"]["service"] == names.READINESS
            assert probes["liveness"]["grpc"]["service"] == names.LIVENESS
            # A gateway without an engine is not broken; a model that never loads is.
            started = names.LIVENESS if name == "gateway" else names.READINESS
            assert probes["startup"]["grpc"]["service"] == started
            # One slow answer must not end every stream.
            assert (
                probes["liveness"]["periodSeconds"] * probes["liveness"]["failureThreshold"] >= 30
            )


def test_engines_have_ten_minutes_to_load(everything: list[Rendering]) -> None:
    for rendered in everything:
        probe = container(rendered.get("Deployment", "engine"))["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 600


def test_grace_covers_the_drain(everything: list[Rendering]) -> None:
    """Strictly, with a margin; and a stream by the default deadline is never cut."""
    for rendered in everything:
        for name, deployment in rendered.services():
            settings = settings_of(name, environment(deployment))
            sleep = container(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
            ending = ABORT_SECONDS + CLOSE_SECONDS + FLUSH_SECONDS
            needed = sleep + settings.drain_delay_seconds + settings.drain_seconds + ending
            grace = pod(deployment)["terminationGracePeriodSeconds"]
            assert grace >= needed + MARGIN_SECONDS, f"{rendered.name}: {name}"
            if name != "tokenizer":
                assert settings.drain_seconds >= settings.default_deadline_seconds
            # The gateway has noticed that an engine leaves before it refuses.
            if name == "engine":
                gateway = rendered.get("Deployment", "gateway")
                assert sleep > settings_of("gateway", environment(gateway)).resolve_seconds  # type: ignore[attr-defined]


def test_connections_age_where_clients_balance_themselves(everything: list[Rendering]) -> None:
    for rendered in everything:
        ages = {
            name: settings_of(name, environment(deployment)).max_connection_age_seconds
            for name, deployment in rendered.services()
        }
        for name in ("gateway", "tokenizer"):
            age = ages[name]
            assert age is not None
            assert 300 <= age <= 600
        # The gateway opens a channel for each engine and keeps a stream on it.
        assert ages["engine"] is None


def test_upstreams_are_the_services(everything: list[Rendering]) -> None:
    for rendered in everything:
        settings: Any = settings_of("gateway", environment(rendered.get("Deployment", "gateway")))
        for name, targets in (("tokenizer", settings.tokenizer), ("engine", settings.engine)):
            port = rendered.get("Service", name)["spec"]["ports"][0]["port"]
            assert targets == (f"dns:///{name}:{port}",)


def test_our_own_traces_are_continued_and_strangers_are_not(everything: list[Rendering]) -> None:
    for rendered in everything:
        for name, deployment in rendered.services():
            settings = settings_of(name, environment(deployment))
            assert settings.trust_incoming_trace is (name != "gateway")


def test_traces_go_to_the_collector(everything: list[Rendering]) -> None:
    for rendered in everything:
        with_collector = "otel-collector" in rendered.names("Deployment")
        for _, deployment in rendered.services():
            endpoint = environment(deployment).get("OTEL_EXPORTER_OTLP_ENDPOINT")
            if not with_collector:
                assert endpoint is None
                continue
            service = rendered.get("Service", "otel-collector")
            port = service["spec"]["ports"][0]["port"]
            assert endpoint == f"http://{service['metadata']['name']}:{port}"
            values = environment(deployment)["OTEL_RESOURCE_ATTRIBUTES"]
            # $(NAME) is only filled in from variables that stand before it.
            order = [variable["name"] for variable in container(deployment)["env"]]
            for used in ("POD_NAME", "NODE_NAME"):
                assert f"$({used})" in values
                assert order.index(used) < order.index("OTEL_RESOURCE_ATTRIBUTES")


def test_pods_are_restricted(everything: list[Rendering]) -> None:
    """The restricted Pod Security Standard, and a root file system that nobody writes to."""
    for rendered in everything:
        enforced = rendered.get("Namespace", "nanoinfer")["metadata"]["labels"]
        assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
        for deployment in rendered.of("Deployment"):
            spec = pod(deployment)
            context = spec["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] > 0
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert spec["automountServiceAccountToken"] is False
            assert spec["enableServiceLinks"] is False
            for forbidden in ("hostNetwork", "hostPID", "hostIPC", "hostAliases"):
                assert forbidden not in spec
            for volume in spec.get("volumes", []):
                assert "hostPath" not in volume
            for each in all_containers(deployment):
                security = each["securityContext"]
                assert security["allowPrivilegeEscalation"] is False
                assert security["readOnlyRootFilesystem"] is True
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert "privileged" not in security
                assert all("hostPort" not in port for port in each.get("ports", []))


def test_resources_are_bounded(everything: list[Rendering]) -> None:
    for rendered in everything:
        for deployment in rendered.of("Deployment"):
            for each in all_containers(deployment):
                assert cores(each, "requests") <= cores(each, "limits")
                assert memory_bytes(each, "requests") == memory_bytes(each, "limits")
            for volume in pod(deployment).get("volumes", []):
                assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]
        engine = rendered.get("Deployment", "engine")
        settings: Any = settings_of("engine", environment(engine))
        assert settings.threads == cores(container(engine), "requests")
        if settings.device == "cpu":
            # The rest is torch, the weights and the activations.
            free = memory_bytes(container(engine), "limits") - int(settings.kv_cache_memory)
            assert free >= 1.5 * 2**30


def test_every_mount_has_a_volume_and_engines_have_a_cache(everything: list[Rendering]) -> None:
    for rendered in everything:
        for deployment in rendered.of("Deployment"):
            volumes = {volume["name"]: volume for volume in pod(deployment).get("volumes", [])}
            used = {
                m["name"] for c in all_containers(deployment) for m in c.get("volumeMounts", [])
            }
            assert used == set(volumes)
            for volume in volumes.values():
                if "configMap" in volume:
                    rendered.get("ConfigMap", volume["configMap"]["name"])
                if "persistentVolumeClaim" in volume:
                    claim = volume["persistentVolumeClaim"]["claimName"]
                    rendered.get("PersistentVolumeClaim", claim)
        mounts = container(rendered.get("Deployment", "engine"))["volumeMounts"]
        assert {"/tmp", "/dev/shm"} <= {mount["mountPath"] for mount in mounts}


def test_models_are_mounted_where_they_are_looked_for(everything: list[Rendering]) -> None:
    for rendered in everything:
        for name in ("tokenizer", "engine"):
            deployment = rendered.get("Deployment", name)
            settings: Any = settings_of(name, environment(deployment))
            mounts = {m["mountPath"]: m for m in container(deployment)["volumeMounts"]}
            if "model-volume" in rendered.name or rendered.of("PersistentVolumeClaim"):
                assert str(settings.model.parent) in mounts
                assert mounts[str(settings.model.parent)]["readOnly"] is True
            assert str(settings.model) == "/models/model"


def test_gpus_are_asked_for_where_they_are_used(everything: list[Rendering]) -> None:
    for rendered in everything:
        engine = rendered.get("Deployment", "engine")
        settings: Any = settings_of("engine", environment(engine))
        limits = container(engine)["resources"]["limits"]
        on_gpu = settings.device == "cuda"
        assert on_gpu is ("gpu" in rendered.name.split("+"))
        assert ("nvidia.com/gpu" in limits) is on_gpu
        assert container(engine)["image"].endswith("-cuda") is on_gpu
        rolling = engine["spec"]["strategy"]["rollingUpdate"]
        expected = (
            {"maxSurge": 0, "maxUnavailable": 1} if on_gpu else {"maxSurge": 1, "maxUnavailable": 0}
        )
        assert rolling == expected


def test_the_cpu_overlay_brings_its_model(overlays: dict[str, Rendering]) -> None:
    cpu = overlays["cpu"]
    for name in ("tokenizer", "engine"):
        assert container(cpu.get("Deployment", name))["image"].endswith("-guide")
    for _, deployment in cpu.services():
        assert deployment["spec"]["replicas"] == 2
