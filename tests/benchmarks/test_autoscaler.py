"""The autoscaler's algorithm against examples worked out by hand, many from Kubernetes' pages."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.scale.autoscaler import (
    Autoscaler,
    Rules,
    Settings,
    proposal,
)

FREE = Rules(0, (("Percent", 10_000, 15),))
AT_ONCE = Rules(0, (("Percent", 100, 15),))


def settings(up: Rules = FREE, down: Rules = AT_ONCE, highest: int = 1000) -> Settings:
    return Settings(1, highest, {"cpu": 0.5}, up, down)


@pytest.mark.parametrize(
    ("values", "missing", "target", "expected"),
    [
        # "if the current metric value is 200m, and the desired value is 100m, ... doubled"
        ([200.0], 0, 100.0, 2),
        # "if the current value is instead 50m, ... halved"
        ([50.0, 50.0], 0, 100.0, 1),
        # "skips any scaling action if the ratio is sufficiently close to 1.0 (within ... 0.1)"
        ([110.0] * 10, 0, 100.0, 10),
        ([90.0] * 10, 0, 100.0, 10),
        ([111.0] * 10, 0, 100.0, 12),
        ([89.0] * 10, 0, 100.0, 9),
        # missing pods count as idle on the way up: 450 / 4 pods = 1.125, 4.5 → 5 rather than 6
        ([150.0] * 3, 1, 100.0, 5),
        # that would turn the direction round (450 / 6 = 0.75): nothing
        ([150.0] * 3, 3, 100.0, 6),
        # and as at the target on the way down: (40 + 200) / 4 = 0.6, 2.4 → 3 rather than 1
        ([20.0] * 2, 2, 100.0, 3),
        # no figure at all: nothing
        ([], 3, 100.0, 3),
    ],
)
def test_pods_metric(values: list[float], missing: int, target: float, expected: int) -> None:
    assert proposal(values, missing, target) == expected


def test_the_highest_proposal_counts_within_the_bounds() -> None:
    assert Autoscaler(settings()).decide(0, 4, [3, 9, 5]) == 9
    assert Autoscaler(settings(highest=8)).decide(0, 4, [3, 9, 5]) == 8
    assert Autoscaler(settings()).decide(0, 4, [0]) == 1


def test_scale_down_takes_the_highest_of_its_window() -> None:
    scaler = Autoscaler(settings(down=Rules(300, (("Percent", 100, 15),))))
    assert scaler.decide(0, 10, [10]) == 10
    assert scaler.decide(100, 10, [6]) == 10
    assert scaler.decide(200, 10, [4]) == 10
    assert scaler.decide(299, 10, [4]) == 10
    assert scaler.decide(300, 10, [4]) == 6
    assert scaler.decide(400, 6, [4]) == 4


def test_scale_up_takes_the_lowest_of_its_window() -> None:
    scaler = Autoscaler(settings(up=Rules(30, (("Pods", 100, 15),))))
    assert scaler.decide(0, 2, [2]) == 2
    assert scaler.decide(15, 2, [5]) == 2
    assert scaler.decide(30, 2, [6]) == 5
    assert scaler.decide(45, 5, [8]) == 6


def test_a_recommendation_that_swings_moves_nothing() -> None:
    window = Rules(60, (("Pods", 100, 15),))
    scaler = Autoscaler(settings(up=window, down=window))
    assert scaler.decide(-15, 5, [5]) == 5
    for number in range(20):
        assert scaler.decide(15 * number, 5, [3 if number % 2 else 8]) == 5


def test_default_scale_up_policies() -> None:
    """ "4 pods or a 100% of the currently running replicas may be added every 15 seconds"."""
    scaler = Autoscaler(settings(up=Rules(0, (("Percent", 100, 15), ("Pods", 4, 15)))))
    assert scaler.decide(0, 1, [1000]) == 5
    assert scaler.decide(10, 5, [1000]) == 5, "the period's allowance is used up"
    assert scaler.decide(15, 5, [1000]) == 10
    assert scaler.decide(30, 10, [1000]) == 20


def test_scale_down_policies_as_documented() -> None:
    """80 to 10 replicas with 4 pods or 10 % a minute: by 8, by 8 (7.2 rounded up), then by 4."""
    rules = Rules(0, (("Pods", 4, 60), ("Percent", 10, 60)))
    scaler, path = Autoscaler(settings(down=rules)), [80]
    for minute in range(14):
        path.append(scaler.decide(60 * minute, path[-1], [10]))
    assert path[:3] == [80, 72, 64]
    by_pods = [a - b for a, b in pairwise(path) if a <= 40 and b > 10]
    assert by_pods
    assert set(by_pods) == {4}
    assert path[-1] == 10


@pytest.mark.parametrize("service", ["gateway", "tokenizer", "engine"])
def test_the_deployed_settings_are_read_in_full(service: str) -> None:
    found = Settings.load(service)
    expected = (
        {"waiting", "kv_cache_usage", "running"} if service == "engine" else {"cpu", "inflight"}
    )
    assert set(found.targets) == expected
    assert all(target > 0 for target in found.targets.values())
    assert found.up.policies
    assert found.down.policies
    assert 0 <= found.up.window < found.down.window
