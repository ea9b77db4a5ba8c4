"""The list of faults of `tests/mutations.py` fits the sources as they are now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mutations
from tests.mutations import FAULTS, PACKAGES, ROOT, SOURCES, TESTS, Fault, FaultError

FOLDERS = {Path(package).name: ROOT / package for package in PACKAGES}


def source(fault: Fault) -> str:
    package, *rest = Path(SOURCES[fault.source]).parts
    return FOLDERS[package].joinpath(*rest).read_text()


@pytest.mark.parametrize("fault", FAULTS, ids=mutations.told)
def test_each_fault_changes_one_place_of_one_line(fault: Fault) -> None:
    content = source(fault)
    faulty = mutations.changed(content, fault)
    pairs = zip(content.splitlines(), faulty.splitlines(), strict=True)
    assert sum(before != after for before, after in pairs) == 1
    compile(faulty, SOURCES[fault.source], "exec")
    path, _, name = mutations.test_id(fault).partition("::")
    assert f"def {name}(" in (ROOT / path).read_text() or not name


def test_there_are_faults_in_everything_that_is_listed() -> None:
    assert len(FAULTS) >= 30
    assert {fault.source for fault in FAULTS} == set(SOURCES)
    assert {fault.tests.partition("::")[0] for fault in FAULTS} == set(TESTS)
    assert len(set(FAULTS)) == len(FAULTS)


@pytest.mark.parametrize("content", ["", "old old"])
def test_a_text_that_is_not_there_exactly_once_is_an_error(content: str) -> None:
    fault = Fault("queue", "old", "new", "queue")
    with pytest.raises(FaultError, match=f"has {content.count('old')} times: old"):
        mutations.changed(content, fault)
    assert mutations.changed("one old text", fault) == "one new text"


def test_samples_of_all_turns_are_the_whole_list() -> None:
    turns = [mutations.chosen(8, turn, []) for turn in range(len(FAULTS))]
    assert all(len(each) == 8 == len(set(each)) for each in turns)
    stride = len(FAULTS) // 8
    assert set().union(*turns) >= set(range(8 * stride))
    assert mutations.chosen(None, 0, []) == list(range(len(FAULTS)))
    assert mutations.chosen(8, 0, [3]) == [3]
