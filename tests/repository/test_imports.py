"""The positive list of third-party packages per room; import-linter holds what is forbidden."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "google",
    "grpc",
    "grpc_health",
    "grpc_reflection",
    "opentelemetry",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "structlog",
    "uvloop",
    "yaml",
}
SERVICE = {"nanoinfer", "nanoinfer_common", "google", "grpc", "opentelemetry", "prometheus_client"}
SERVICE |= {"pydantic", "structlog"}
ALLOWED = {
    "clients/python/nanoinfer": {"nanoinfer", "google", "grpc", "opentelemetry", "rich", "typer"},
    "services/common/nanoinfer_common": {"nanoinfer", "nanoinfer_common", *COMMON},
    "services/tokenizer/nanoinfer_tokenizer": {
        "nanoinfer_tokenizer",
        "tiktoken",
        "tokenizers",
        "jinja2",
        *SERVICE,
    },
    "services/engine/nanoinfer_engine": {
        "nanoinfer_engine",
        "torch",
        "triton",
        "numpy",
        "safetensors",
        "tqdm",
        *SERVICE,
    },
    "gateway/nanoinfer_gateway": {"nanoinfer_gateway", "grpc_health", *SERVICE},
}
ENGINE = ROOT / "services/engine/nanoinfer_engine"
GATEWAY_CORE = ROOT / "gateway/nanoinfer_gateway/core"
# what of the shared room reads a model's files: the standard library alone, no proto, no grpc
PLAIN = {"nanoinfer_common.json_files", "nanoinfer_common.model_paths"}


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports, wherever in the file the import stands."""
    yield from (name.partition(".")[0] for name in modules(path))


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_is_listed(room: str) -> None:
    allowed = ALLOWED[room] | set(sys.stdlib_module_names)
    foreign = {
        f"{path.relative_to(ROOT)}: {package}"
        for path in (ROOT / room).rglob("*.py")
        for package in imported(path)
        if package not in allowed
    }
    assert foreign == set()


def test_the_engines_policy_is_free_of_torch_and_of_the_settings_library() -> None:
    models = (ENGINE / "models" / name for name in ("families.py", "model_config.py"))
    files = [*(ENGINE / "core").rglob("*.py"), *models]
    assert len(files) > 10
    for path in files:
        assert not {"torch", "pydantic", "pydantic_settings"} & set(imported(path)), path


def modules(path: Path) -> Iterator[str]:
    """The whole names of what a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def test_only_the_engines_edge_knows_proto_and_grpc() -> None:
    edge = [ENGINE / "__main__.py", *(ENGINE / "server").rglob("*.py")]
    assert len(edge) > 5
    for path in set(ENGINE.rglob("*.py")) - set(edge):
        packages = {name.partition(".")[0] for name in set(modules(path)) - PLAIN}
        assert packages.isdisjoint({"grpc", "google", "nanoinfer", "nanoinfer_common"}), path


def test_the_gateways_core_takes_no_rpc_and_no_context() -> None:
    """Messages are its values; the RPCs that carry them, and what comes with a call, are not."""
    files = list(GATEWAY_CORE.rglob("*.py"))
    assert len(files) > 10
    foreign = (
        "GatewayService",
        "_pb2_grpc",
        "context: Any",
        "invocation_metadata",
        "read_metadata",
    )
    for path in files:
        text = path.read_text()
        assert [name for name in foreign if name in text] == [], path
        assert set(imported(path)).isdisjoint({"grpc", "grpc_health"}), path


def test_what_reads_a_models_files_for_all_is_the_standard_librarys_alone() -> None:
    for name in PLAIN:
        path = ROOT / "services/common" / f"{name.replace('.', '/')}.py"
        packages = {each.partition(".")[0] for each in set(modules(path)) - PLAIN}
        assert packages <= set(sys.stdlib_module_names), name
