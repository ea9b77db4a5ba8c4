"""Generates the Python stubs of the contract; runs in the codegen environment (`make proto`).

The generator is pinned below the runtime: gencode of grpcio-tools 1.81 (protobuf 6.33) loads under
protobuf 6.33.5 and later, while newer gencode is refused by an older runtime. The gRPC plugin runs
only on files that hold a service; on others it would leave empty modules behind.

Usage: python proto/generate.py OUTPUT_DIRECTORY
"""

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(output: Path) -> None:
    """Writes `nanoinfer/v1/*` below `output`; raises SystemExit where protoc refuses."""
    output.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in (ROOT / "nanoinfer").rglob("*.proto"))
    services = [path for path in files if "\nservice " in path.read_text()]
    includes = [
        f"-I{ROOT}",
        f"-I{resources.files('grpc_tools') / '_proto'}",
    ]
    messages_out = [f"--python_out={output}", f"--pyi_out={output}"]
    services_out = [f"--grpc_python_out={output}", f"--mypy_grpc_out={output}"]
    for options, paths in ((messages_out, files), (services_out, services)):
        arguments = ["protoc", *includes, *options, *map(str, paths)]
        if code := protoc.main(arguments):
            raise SystemExit(code)


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
