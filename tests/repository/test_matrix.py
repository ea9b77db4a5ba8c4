"""Every row of the fault matrix has a test, and every test that names a row names a known one."""

from __future__ import annotations

import ast

import pytest

from tests import matrix


@pytest.fixture(scope="module")
def rows() -> list[matrix.Row]:
    return matrix.rows(matrix.DOCUMENT.read_text())


def test_the_rows_are_numbered_without_a_gap(rows: list[matrix.Row]) -> None:
    assert [row.name for row in rows] == [f"R{number}" for number in range(1, 89)]


def test_every_row_that_is_built_is_proven(rows: list[matrix.Row]) -> None:
    proven = {name for name, tests in matrix.proofs().items() if tests}
    unproven = {row.name for row in rows if row.is_built} - proven
    assert unproven == set()


def test_tests_name_known_rows_that_are_built(rows: list[matrix.Row]) -> None:
    known = {row.name for row in rows if row.is_built}
    assert {name: tests for name, tests in matrix.proofs().items() if name not in known} == {}


def test_only_tests_prove_rows() -> None:
    claimed = [claim for tests in matrix.proofs().values() for claim in tests]
    assert [claim for claim in claimed if "::test_" not in claim] == []


def test_claims_are_found_in_every_form_of_a_mark() -> None:
    source = """
pytestmark = [pytest.mark.slow, pytest.mark.matrix("R1")]

@pytest.mark.matrix("R2", "R3")
async def test_one(): ...

class TestTwo:
    @pytest.mark.slow
    @pytest.mark.matrix("R4")
    def test_two(self): ...
"""
    found = set(matrix.claims(ast.parse(source)))
    assert found == {
        ("R1", "test_one"),
        ("R1", "test_two"),
        ("R2", "test_one"),
        ("R3", "test_one"),
        ("R4", "test_two"),
    }


def test_a_row_without_a_test_is_told() -> None:
    row = matrix.Row("R1", "fault", "client", "system", is_built=True)
    assert matrix.state(row, []) == "UNPROVEN"
    assert matrix.state(row, ["test"]) == "test"
    unbuilt = matrix.Row("R15", "fault", "client", "system", is_built=False)
    assert matrix.state(unbuilt, []) == "not built"


def test_the_table_is_printed_and_the_exit_code_is_right(
    rows: list[matrix.Row], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert matrix.main() == 0
    printed = capsys.readouterr().out
    assert all(f"| {row.name} | {row.fault} |" in printed for row in rows)
    monkeypatch.setattr(matrix, "proofs", dict)
    assert matrix.main() == 1
    assert "UNPROVEN" in capsys.readouterr().out
