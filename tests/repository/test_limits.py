"""House limits on production Python: length of files and functions, and names of files."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "clients/python/nanoinfer",
    "services/common/nanoinfer_common",
    "services/tokenizer/nanoinfer_tokenizer",
    "services/engine/nanoinfer_engine",
    "gateway/nanoinfer_gateway",
)
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def production_files() -> list[Path]:
    generated = ROOT / "clients/python/nanoinfer/v1"
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return [path for path in files if generated not in path.parents]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_room_has_files() -> None:
    for room in ROOMS:
        assert any(ROOT / room in path.parents for path in production_files()), room


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): num_lines(p) for p in production_files()}
    assert {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in production_files()
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_no_forbidden_file_names() -> None:
    names = {path.name for path in production_files()}
    assert names.isdisjoint({"utils.py", "helpers.py", "util.py", "helper.py", "misc.py"})
