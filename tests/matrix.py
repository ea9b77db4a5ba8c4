"""The fault matrix beside the tests that prove it: `python tests/matrix.py` prints the table.

Exits with 1 where a row that is built has no test.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
DOCUMENT = TESTS.parent / "docs" / "fault-matrix.md"
ROW = re.compile(r"\| (R\d+) \| (.+) \| (.+) \| (.+) \|$")


@dataclass(frozen=True)
class Row:
    """A fault, what clients see of it, and what the system keeps."""

    name: str
    fault: str
    client: str
    system: str
    is_built: bool


def rows(document: str) -> list[Row]:
    """The rows of the document, in its order."""
    tables, _, rest = document.partition("\n## Not built\n")
    missing = set(re.findall(r"R\d+", rest))
    found = [match.groups() for match in map(ROW.match, tables.splitlines()) if match]
    return [Row(*cells, is_built=cells[0] not in missing) for cells in found]


def claims(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Row and test of each `pytest.mark.matrix` in a file; a mark of the file counts for all."""
    tests = [node for node in ast.walk(tree) if is_test(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for row in marked(*node.decorator_list):
                yield row, node.name
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "pytestmark":
            yield from ((row, test.name) for row in marked(node.value) for test in tests)


def is_test(node: ast.AST) -> bool:
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return is_function and node.name.startswith("test_")


def marked(*expressions: ast.expr) -> Iterator[str]:
    """The rows that marks name."""
    for expression in expressions:
        for node in ast.walk(expression):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.matrix":
                yield from (str(ast.literal_eval(argument)) for argument in node.args)


@functools.cache
def proofs() -> dict[str, list[str]]:
    """The tests that claim each row, as `file::test`."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("*.py")):
        for row, test in claims(ast.parse(path.read_text())):
            found[row].append(f"{path.relative_to(TESTS).as_posix()}::{test}")
    return found


def state(row: Row, tests: list[str]) -> str:
    """What stands in the row: its tests, before them a word where they do not prove it."""
    if tests:
        return "<br>".join(tests)
    return "UNPROVEN" if row.is_built else "not built"


def main() -> int:
    """Prints the table; 1 where a row is unproven."""
    proven, table = proofs(), rows(DOCUMENT.read_text())
    print("| row | fault | proven by |\n|---|---|---|")
    states = [(row, state(row, proven.get(row.name, []))) for row in table]
    for row, said in states:
        print(f"| {row.name} | {row.fault} | {said} |")
    unproven = [row.name for row, said in states if said == "UNPROVEN"]
    words = ("not built", "pending")
    counts = {word: sum(said.startswith(word) for _, said in states) for word in words}
    num_proven = len(table) - len(unproven) - sum(counts.values())
    print(f"\n{len(table)} rows: {num_proven} proven, {counts['pending']} pending,", end=" ")
    print(f"{counts['not built']} not built, {len(unproven)} unproven {unproven or ''}")
    return 1 if unproven else 0


if __name__ == "__main__":
    sys.exit(main())
