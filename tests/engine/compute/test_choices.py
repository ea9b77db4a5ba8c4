"""Choices that are kept: what comes back, what makes them another's, what is no error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from nanoinfer_engine.ops.cuda.choices import ChoiceFile, source_digest


@dataclass(frozen=True)
class Shape:
    width: int
    early: bool


@dataclass(frozen=True)
class Opaque:
    place: int
    data: bytes


KINDS = (Shape, Opaque)
FACTS = {"device": ["a card", 132], "code": "c"}
CHOICES = {
    "down": {1: Shape(4, True), 64: Opaque(3, bytes(range(64))), 128: None},
    "head": {16: Shape(2, False)},
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ChoiceFile(tmp_path / "not there yet", FACTS, KINDS).write(CHOICES)
    assert ChoiceFile(tmp_path / "not there yet", FACTS, KINDS).read() == CHOICES


def test_other_facts_have_another_file(tmp_path: Path) -> None:
    ChoiceFile(tmp_path, FACTS, KINDS).write(CHOICES)
    assert ChoiceFile(tmp_path, FACTS | {"code": "d"}, KINDS).read() is None


def test_the_last_written_counts(tmp_path: Path) -> None:
    file = ChoiceFile(tmp_path, FACTS, KINDS)
    file.write(CHOICES)
    file.write({"head": {8: None}})
    assert file.read() == {"head": {8: None}}
    assert list(tmp_path.iterdir()) == [file.path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        json.dumps({"down": [1]}),
        json.dumps({"down": {"one": None}}),
        json.dumps({"down": {"1": ["Unknown", 1]}}),
        json.dumps({"down": {"1": ["Shape", 1]}}),
        json.dumps({"down": {"1": ["Opaque", 1, {"hex": "xyz"}]}}),
        json.dumps({"down": {"1": 7}}),
    ],
)
def test_what_cannot_be_understood_is_not_there(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ChoiceFile(tmp_path, FACTS, KINDS)
    file.path.write_text(text)
    assert file.read() is None
    assert "cannot be read" in caplog.text


def test_a_directory_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    file = ChoiceFile(tmp_path / "file" / "below", FACTS, KINDS)
    file.write(CHOICES)
    assert "cannot be written" in caplog.text
    assert file.read() is None


def test_nothing_is_left_of_a_file_that_found_no_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ChoiceFile(tmp_path, FACTS, KINDS)
    file.path.mkdir()
    file.write(CHOICES)
    assert "cannot be written" in caplog.text
    assert list(tmp_path.iterdir()) == [file.path]


def test_the_source_has_one_digest() -> None:
    assert source_digest() == source_digest()
    assert len(source_digest()) == 64
