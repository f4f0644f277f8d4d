"""Reading text: every format, and what a user is told when it cannot be read."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.data import DatasetSource, EmbeddedSource, TextSource, corpora
from mcsharp_sdk.data.corpora import calibration_pieces, read_text
from mcsharp_sdk.embedded import calibration_text
from mcsharp_sdk.errors import InputError

DOCUMENTS = ["first ünï", "second\nof two lines", "third"]


def write_json_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_plain_text_is_read_as_it_is_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PIECE", 7)
    text = "  one ünïcödé €𝄞\n\n two \n" * 5
    for name in ("a.txt", "a.md", "suffixless"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_text(tmp_path / name) == text


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    assert read_text(tmp_path / "a.txt") == "text"


def test_json_lines_are_joined_with_an_empty_line(tmp_path: Path) -> None:
    rows: list[object] = [{"body": text, "id": 1} for text in [*DOCUMENTS, "", "  "]]
    path = write_json_lines(tmp_path / "a.jsonl", [*rows, {"body": None}])
    path.write_text(path.read_text() + "\n\n")
    assert read_text(path, "body") == "\n\n".join(DOCUMENTS)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_json_lines_keep_any_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    kept = [text for text in texts if text.strip()]
    path = write_json_lines(tmp_path_factory.mktemp("j") / "a.jsonl", [{"text": t} for t in texts])
    if kept:
        assert read_text(path) == "\n\n".join(kept)
    else:
        with pytest.raises(InputError, match="has no text"):
            read_text(path)


def test_parquet_gives_the_same_text_as_json_lines(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": [1, 2, 3, 4], "body": [*DOCUMENTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_text(tmp_path / "a.parquet", "body") == "\n\n".join(DOCUMENTS)
    with pytest.raises(InputError, match=r"no field 'text' but 'id', 'body'; set 'field'"):
        read_text(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="field 'id' is a int, not text"):
        read_text(tmp_path / "a.parquet", "id")
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as parquet"):
        read_text(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'mcsharp_sdk\[datasets\]'"):
        read_text(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: has no text"),
        ("a.txt", b" \n\t\n", r"a\.txt: has no text"),
        ("a.txt", b"ab\x00cd", r"a\.txt: is a binary file"),
        ("a.txt", "ünï".encode("latin-1"), r"a\.txt: is not UTF-8 text"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", r"a\.jsonl: is not UTF-8 text"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: has no text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3: is not JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: is a JSON list; each line must be one object"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: has no field 'text' but 'body'; set 'field'"),
        ("a.jsonl", b"{}\n", r"a\.jsonl:1: has no field 'text' but no field at all"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is a int, not text"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: is not JSON"),
        (
            "a.jsonl",
            b'{"text": "\\ud83d\\ude00"}\n{"text": "ab\\ud83d"}',
            r"a\.jsonl:2: field 'text' has half a character, \\ud83d, at place 2",
        ),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: is not JSON"),
        ("a.json", b"{}", r"a\.json: .* name the file '\.jsonl'"),
    ],
)
def test_an_unreadable_file_is_named_with_the_fault(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_cannot_be_opened_is_refused(name: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as holder, chdir(tmp_path):
        holder.bind(name)  # nobody can open it, not even root
        with pytest.raises(InputError, match=rf"{name}: cannot be read: .*; make it readable"):
            read_text(tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: there is no such file"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path)


def test_a_large_file_is_read_only_as_far_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PIECE", 4)
    (tmp_path / "a.txt").write_bytes(b"good text" + b" " * 100_000 + b"\xff")
    pieces = calibration_pieces(TextSource(path=tmp_path / "a.txt"))
    assert [next(pieces), next(pieces)] == ["good", " tex"]


def test_the_embedded_source_is_the_embedded_text() -> None:
    assert "".join(calibration_pieces(EmbeddedSource())) == calibration_text()


def test_a_dataset_is_read_from_plain_files_and_from_a_saved_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows: list[object] = [{"body": text} for text in DOCUMENTS]
    (tmp_path / "plain").mkdir()
    write_json_lines(tmp_path / "plain" / "train.jsonl", rows)
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "split")
    for name in ("plain", "saved", "split"):
        source = DatasetSource(name=str(tmp_path / name), field="body")
        assert "".join(calibration_pieces(source)) == "\n\n".join(DOCUMENTS)
    with pytest.raises(InputError, match="has no field 'text' but 'body'"):
        list(calibration_pieces(DatasetSource(name=str(tmp_path / "plain"))))
    for name in ("plain", "split"):
        wrong = DatasetSource(name=str(tmp_path / name), split="nothing", field="body")
        with pytest.raises(InputError, match="split 'nothing' cannot be read"):
            list(calibration_pieces(wrong))


def test_a_dataset_without_the_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'mcsharp_sdk\[datasets\]'"):
        list(calibration_pieces(DatasetSource(name="any")))
