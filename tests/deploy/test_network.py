"""The network policies allow the call graph and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.deploy.rendering import Document, Rendering

NAMESPACE = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Peer:
    """A pod somewhere; `namespace` by name."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "nanoinfer"


STRANGER = Peer("stranger", {}, "default")
SCRAPER = Peer("prometheus", {}, "monitoring")
DNS = Peer("dns", {"k8s-app": "kube-dns"}, "kube-system")
STORE = Peer("tempo", {}, "monitoring")
PORTS = (53, 4317, 9091, 9092, 9093, 13133, 50051, 50052, 50053)


def selects(policy: Document, peer: Peer, direction: str) -> bool:
    spec = policy["spec"]
    wanted = spec["podSelector"].get("matchLabels", {})
    here = peer.namespace == "nanoinfer" and wanted.items() <= peer.labels.items()
    return here and direction in spec["policyTypes"]


def matches(entry: Document, peer: Peer) -> bool:
    if "namespaceSelector" in entry:
        if entry["namespaceSelector"]["matchLabels"] != {NAMESPACE: peer.namespace}:
            return False
    elif peer.namespace != "nanoinfer":
        return False
    wanted = entry.get("podSelector", {}).get("matchLabels", {})
    return bool(wanted.items() <= peer.labels.items())


def allowed_by(rules: list[Document], side: str, peer: Peer, port: int) -> bool:
    for rule in rules:
        ports: list[Any] = rule["ports"]
        in_range = any(p["port"] <= port <= p.get("endPort", p["port"]) for p in ports)
        if in_range and (side not in rule or any(matches(e, peer) for e in rule[side])):
            return True
    return False


def may_connect(policies: list[Document], source: Peer, target: Peer, port: int) -> bool:
    """As the API defines it: both ends must allow it, where a policy selects them."""
    for direction, own, other, side in (
        ("Egress", source, target, "to"),
        ("Ingress", target, source, "from"),
    ):
        chosen = [policy for policy in policies if selects(policy, own, direction)]
        rules = [rule for p in chosen for rule in p["spec"].get(direction.lower(), [])]
        if chosen and not allowed_by(rules, side, other, port):
            return False
    return True


def peers(rendered: Rendering) -> list[Peer]:
    own = [
        Peer(d["metadata"]["name"], d["spec"]["template"]["metadata"]["labels"])
        for d in rendered.of("Deployment")
    ]
    return [*own, STRANGER, SCRAPER, DNS, STORE]


def call_graph(rendered: Rendering) -> set[tuple[str, str, int]]:
    services = ("gateway", "tokenizer", "engine")
    edges = {("gateway", "tokenizer", 50052), ("gateway", "engine", 50053)}
    outside = {"stranger", "prometheus", "dns", "tempo"}
    edges |= {(name, "gateway", 50051) for name in outside}
    edges |= {(name, "dns", 53) for name in rendered.names("Deployment")}
    # the monitoring namespace as a whole may scrape
    for name, port in zip(services, (9091, 9092, 9093), strict=True):
        edges |= {("prometheus", name, port), ("tempo", name, port)}
    if "otel-collector" in rendered.names("Deployment"):
        edges |= {(name, "otel-collector", 4317) for name in services}
        edges |= {("otel-collector", name, 4317) for name in outside}
    return edges


def test_the_policies_are_the_call_graph(everything: list[Rendering]) -> None:
    seen = 0
    for rendered in everything:
        policies = rendered.of("NetworkPolicy")
        if not policies:
            continue
        seen += 1
        own = rendered.names("Deployment")
        listening = {
            "gateway": {50051, 9091},
            "tokenizer": {50052, 9092},
            "engine": {50053, 9093},
            "otel-collector": {4317, 13133},
        }
        allowed = {
            (source.name, target.name, port)
            for source in peers(rendered)
            for target in peers(rendered)
            for port in PORTS
            if source.name != target.name
            and (source.name in own or target.name in own)
            and (target.name not in own or port in listening[target.name])
            and may_connect(policies, source, target, port)
        }
        assert allowed == call_graph(rendered), rendered.name
    assert seen


def test_everything_is_denied_first(everything: list[Rendering]) -> None:
    for rendered in everything:
        if rendered.of("NetworkPolicy"):
            deny = rendered.get("NetworkPolicy", "default-deny")["spec"]
            assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
