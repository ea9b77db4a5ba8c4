"""Every place in the code that makes a status for clients: its reason, size and secrecy."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from nanoinfer_common import errors, names
from nanoinfer_common.errors import MAX_STATUS_BYTES, ServiceError, Violation

ROOT = Path(__file__).parents[2]
# Constructors, and where their reason stands among the positional arguments; None has its own.
CONSTRUCTORS = {
    "ServiceError": 1,
    "invalid": 0,
    "exhausted": 0,
    "unavailable": 0,
    "precondition": 0,
    "unimplemented": None,
    "not_found_model": None,
    "internal": None,
}
# What a text for clients must never be made of.
INSIDE = {"path", "model_path", "directory", "environ", "address", "target", "host", "port"}
INSIDE |= {"traceback", "secret", "password", "peer", "__file__", "getcwd"}
# Exceptions of others, whose text may name anything.
FOREIGN = {name for name, value in vars(builtins).items() if isinstance(value, type)}


class Place(NamedTuple):
    """One construction, with the `except` clauses around it."""

    where: str
    name: str
    call: ast.Call
    handlers: tuple[ast.ExceptHandler, ...]
    function: ast.AST | None

    @property
    def told(self) -> list[ast.expr]:
        """Every argument, with what a local variable among them was made of."""
        arguments = [*self.call.args, *(keyword.value for keyword in self.call.keywords)]
        used = {node.id for each in arguments for node in ast.walk(each) if _is_name(node)}
        made = [
            node.value
            for node in ast.walk(self.function or ast.Pass())
            if isinstance(node, ast.Assign)
            and any(_is_name(target) and target.id in used for target in node.targets)
        ]
        return [*arguments, *made]


def _is_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


def places() -> Iterator[Place]:
    for room in ("services", "gateway"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield from _walk(ast.parse(path.read_text(encoding="utf-8")), path.name, (), None)


def _walk(
    node: ast.AST, file: str, handlers: tuple[ast.ExceptHandler, ...], function: ast.AST | None
) -> Iterator[Place]:
    if isinstance(node, ast.ExceptHandler):
        handlers = (*handlers, node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in CONSTRUCTORS and not (file == "errors.py" and name == "invalid"):
            yield Place(f"{file}:{node.lineno}", name, node, handlers, function)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, file, handlers, function)


PLACES = list(places())
# Functions that hand on the reason of their callers, whose places are looked at as well.
HANDS_ON = {"invalid", "exhausted", "unavailable", "precondition", "from_rpc_error", "_refusal"}
HANDS_ON |= {"_invalid", "_refuse", "_admit"}


@pytest.mark.matrix("R88")
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.where} {place.name}")
def test_a_status_has_a_reason_of_ours_and_tells_nothing_of_the_inside(place: Place) -> None:
    position = CONSTRUCTORS[place.name]
    if position is not None and getattr(place.function, "name", "") not in HANDS_ON:
        reason = place.call.args[position]
        assert isinstance(reason, ast.Attribute), "the reason is no constant of `names`"
        assert getattr(names, reason.attr) in names.REASONS
    words = {
        getattr(node, "attr", getattr(node, "id", ""))
        for each in place.told
        for node in ast.walk(each)
    }
    assert not words & INSIDE
    for handler in place.handlers:
        kinds = {
            getattr(node, "attr", getattr(node, "id", ""))
            for node in ast.walk(handler.type or ast.Name("BaseException"))
        }
        foreign = kinds & FOREIGN or "Error" in kinds
        assert not (foreign and handler.name in words), "tells the text of a foreign exception"


@pytest.mark.matrix("R88")
def test_the_walk_finds_every_reason_in_use() -> None:
    """A reason that no place names is dead, or the walk is blind."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for room in ("services", "gateway")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "names.py"
    )
    unused = {reason for reason in names.REASONS if f"names.{reason}" not in sources}
    assert not unused
    assert len(PLACES) > 50


texts = st.text(max_size=3000)


@pytest.mark.matrix("R88")
@given(
    code=st.sampled_from([code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]),
    reason=st.sampled_from(sorted(names.REASONS)),
    message=texts,
    metadata=st.dictionaries(st.text("abcXYZ", min_size=1, max_size=40), texts, max_size=8),
    violations=st.lists(st.builds(Violation, texts, texts), max_size=40),
    retry_after=st.none() | st.floats(0, 1e6),
    request_id=st.text("!az~", min_size=1, max_size=128),
)
def test_whatever_is_told_has_its_reason_and_stays_small(
    code: grpc.StatusCode,
    reason: str,
    message: str,
    metadata: dict[str, str],
    violations: list[Violation],
    retry_after: float | None,
    request_id: str,
) -> None:
    error = ServiceError(
        code, reason, message, metadata=metadata, violations=violations, retry_after=retry_after
    )
    status = errors.to_status(error, "nanoinfer-tokenizer", request_id)
    assert status.ByteSize() + len(status.message.encode()) <= MAX_STATUS_BYTES
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Is(info.DESCRIPTOR) and detail.Unpack(info) for detail in status.details)
    assert (info.reason, info.domain) == (reason, "nanoinfer-tokenizer")
    assert status.code == code.value[0]
