"""JSON files are read the same way by everybody: BOM or none, and a refusal names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nanoinfer_common import json_files
from nanoinfer_common.json_files import JsonFileError, read_object, read_optional_object


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(json.dumps({"a": "é"}, ensure_ascii=False), encoding=encoding)
        assert read_object(file) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"[]", "is not a JSON object"),
        (b"\x80", "cannot be read"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read"),
        (b'{"a":' * 100_000, "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b'{"a": "' + b"x" * 100 + b'"}', "larger than 100 bytes"),
    ],
)
def test_what_is_no_object_is_refused_by_the_files_name(
    content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    if said.startswith("larger"):
        monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 100)
    with pytest.raises(JsonFileError, match=rf"^config\.json.*{said}"):
        read_object(file)


def test_a_file_that_is_not_there_is_an_error_or_empty(tmp_path: Path) -> None:
    with pytest.raises(JsonFileError, match=r"^config\.json cannot be read"):
        read_object(tmp_path / "config.json")
    assert read_optional_object(tmp_path / "config.json") == {}
