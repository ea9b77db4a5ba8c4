"""The HorizontalPodAutoscaler's algorithm (autoscaling/v2), on the manifests that are deployed.

Sources: "Horizontal Pod Autoscaling" in the Kubernetes documentation and, for pods without a
figure, the controller's replica calculator. KEDA acts through an HPA with the same targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

COMPONENTS = Path(__file__).parents[2] / "deploy" / "k8s" / "components"
TOLERANCE = 0.1
SYNC_SECONDS = 15.0


@dataclass(frozen=True)
class Rules:
    """One direction of `behavior`: window, and (type, value, periodSeconds) of each policy."""

    window: float
    policies: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Settings:
    """One autoscaler. Targets are means per pod; `cpu` is a share of what is requested."""

    min_replicas: int
    max_replicas: int
    targets: dict[str, float]
    up: Rules
    down: Rules

    @classmethod
    @cache
    def load(cls, service: str) -> Settings:
        """Read components/hpa."""
        spec = yaml.safe_load((COMPONENTS / "hpa" / f"{service}.yaml").read_text())["spec"]
        targets = {}
        for metric in spec["metrics"]:
            if metric["type"] == "Resource":
                targets["cpu"] = metric["resource"]["target"]["averageUtilization"] / 100
            else:
                name = metric["pods"]["metric"]["name"].removeprefix(f"nanoinfer_{service}_")
                targets[name] = float(metric["pods"]["target"]["averageValue"])
        up, down = (_rules(spec["behavior"][name]) for name in ("scaleUp", "scaleDown"))
        return cls(spec["minReplicas"], spec["maxReplicas"], targets, up, down)


def _rules(behaviour: dict[str, Any]) -> Rules:
    policies = ((p["type"], p["value"], p["periodSeconds"]) for p in behaviour["policies"])
    return Rules(behaviour["stabilizationWindowSeconds"], tuple(policies))


def proposal(values: Sequence[float], missing: int, target: float) -> int:
    """Replicas for a mean per pod; `missing` pods give no figure.

    They count as idle when the others call for more, and as at the target when they call for less;
    nothing changes if that turns the direction round or comes within the tolerance.
    """
    current = len(values) + missing
    if not values:
        return current
    ratio = sum(values) / len(values) / target
    filled = sum(values) + (missing * target if ratio < 1 else 0.0)
    new_ratio = filled / current / target
    if abs(new_ratio - 1) <= TOLERANCE + 1e-9 or (ratio < 1) != (new_ratio < 1):
        return current
    return math.ceil(round(new_ratio * current, 9))


@dataclass
class Autoscaler:
    """One autoscaler's memory: past recommendations and past changes, both with their times."""

    settings: Settings
    recommendations: list[tuple[float, int]] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def decide(self, now: float, current: int, proposals: Sequence[int]) -> int:
        """The number of replicas to set: highest proposal, stabilised, rate-limited, bounded."""
        settings = self.settings
        # the bounds come last; recommendations are remembered without them
        recent = [*self.recommendations, (now, max(proposals))]
        lowest = min(n for t, n in recent if t > now - settings.up.window or t == now)
        highest = max(n for t, n in recent if t > now - settings.down.window or t == now)
        horizon = now - max(settings.up.window, settings.down.window)
        self.recommendations = [(t, n) for t, n in recent if t > horizon]
        wanted = min(max(current, lowest), highest)
        if wanted > current:
            wanted = min(wanted, self._limit(now, current, settings.up, 1))
        elif wanted < current:
            wanted = max(wanted, self._limit(now, current, settings.down, -1))
        result = min(max(wanted, settings.min_replicas), settings.max_replicas)
        if result != current:
            self.changes.append((now, result - current))
        return result

    def _limit(self, now: float, current: int, rules: Rules, sign: int) -> int:
        """The furthest that the most generous policy allows, from where its period began."""
        limits = [current]
        for kind, value, period in rules.policies:
            begin = current - sum(n for t, n in self.changes if t > now - period)
            if kind == "Pods":
                limits.append(begin + sign * int(value))
            elif sign > 0:
                limits.append(math.ceil(begin * (1 + value / 100)))
            else:
                limits.append(int(begin * (1 - value / 100)))
        return max(limits) if sign > 0 else min(limits)
