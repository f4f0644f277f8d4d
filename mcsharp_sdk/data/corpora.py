"""Read calibration and evaluation text, piece by piece, so that its size does not matter.

Text is given out as pieces: put together they are the text. Documents (JSON lines, parquet rows,
dataset rows) are put together with one empty line between them; there is no other mark of a
document's end, so a window of tokens may reach from one document into the next.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mcsharp_sdk.data.calibration import Calibration, DatasetSource, ImageTextSource, TextSource
from mcsharp_sdk.errors import InputError

SEPARATOR = "\n\n"
PIECE = 1 << 20
"""Characters of a plain text that are read at once."""

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
"""A surrogate without its partner: JSON can write it as an escape, UTF-8 and tokenizers cannot."""

INSTALL_DATASETS = "pip install 'mcsharp_sdk[datasets]'"


def calibration_pieces(settings: Calibration) -> Iterator[str]:
    """The text that calibration settings name.

    Raises
    ------
    InputError
        While reading: if the text cannot be read, or there is none.
    """
    if isinstance(settings, TextSource):
        return text_pieces(settings.path, settings.field)
    if isinstance(settings, DatasetSource):
        name = calibration_name(settings)
        texts = (_field_of(row, settings.field, name) for row in _dataset_rows(settings))
        return _some(_joined(texts), name)
    from mcsharp_sdk.embedded.text import calibration_text

    return iter([calibration_text()])


def calibration_name(settings: Calibration) -> str:
    """What to call the text in messages."""
    if isinstance(settings, (TextSource, ImageTextSource)):
        return str(settings.path)
    if isinstance(settings, DatasetSource):
        return f"dataset '{settings.name}'"
    return "the embedded calibration text"


def text_pieces(path: Path, field: str = "text") -> Iterator[str]:
    """The text of a file: JSON lines, parquet, or for any other suffix plain UTF-8 text.

    Parameters
    ----------
    field : the field or column that holds the text, where there are fields.

    Raises
    ------
    InputError
        While reading; the message names the file, for JSON lines the line, and what to do.
    """
    try:
        if not path.exists():
            raise InputError(f"{path}: there is no such file")
        if path.is_dir():
            raise InputError(f"{path}: is a folder, a text file is needed")
    except OSError as error:  # of a folder on the way that may not be searched
        raise _unreadable(path, error) from error
    read = _READERS.get(path.suffix.lower(), _plain)
    return _some(read(path, field), str(path))


def read_text(path: Path, field: str = "text") -> str:
    """The whole text of a file at once; see :func:`text_pieces`."""
    return "".join(text_pieces(path, field))


def _plain(path: Path, field: str) -> Iterator[str]:
    with _opened(path) as file:
        while piece := _decoded(path, lambda: file.read(PIECE)):
            yield piece


def _json_lines(path: Path, field: str) -> Iterator[str]:
    return _joined(_json_lines_rows(path, field))


def _json_lines_rows(path: Path, field: str) -> Iterator[str]:
    with _opened(path) as file:
        number = 0
        while line := _decoded(path, file.readline):
            number += 1
            if line.strip():
                yield _field_of(json_object(line, f"{path}:{number}"), field, f"{path}:{number}")


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object that a line of JSON lines holds.

    Raises
    ------
    InputError
        If it holds none; the message begins with ``where``.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}); each line must be one object") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: is a JSON {type(row).__name__}; each line must be one object")
    return row


def _parquet(path: Path, field: str) -> Iterator[str]:
    return _joined(_parquet_rows(path, field))


def _parquet_rows(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow: {INSTALL_DATASETS}") from error
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise InputError(_no_field(field, file.schema_arrow.names, str(path)))
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text_of(value, field, str(path))
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet: {error}") from error


def _refuse_json(path: Path, field: str) -> Iterator[str]:
    raise InputError(
        f"{path}: JSON is read line by line: write one object per line and name the file '.jsonl'"
    )


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".json": _refuse_json,
}


def _dataset_rows(settings: DatasetSource) -> Iterator[dict[str, Any]]:
    """The rows of a dataset; what lies on the hub or in plain files is streamed."""
    where = calibration_name(settings)
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{where} needs the 'datasets' library: {INSTALL_DATASETS}") from error
    try:
        saved = _saved_dataset(settings)
        if saved is not None:
            yield from datasets.load_from_disk(str(saved))
        else:
            yield from datasets.load_dataset(
                settings.name, settings.config, split=settings.split, streaming=True
            )
    except Exception as error:  # the library raises whatever its back ends raise
        raise InputError(
            f"{where}, config {settings.config}, split '{settings.split}' cannot be read: {error}"
        ) from error


def _saved_dataset(settings: DatasetSource) -> Path | None:
    """Folder of the split, if the name is a folder that ``save_to_disk`` wrote."""
    folder = Path(settings.name)
    if (folder / "dataset_dict.json").is_file():
        folder = folder / settings.split
        if not folder.is_dir():
            raise FileNotFoundError("there is no such split")
    return folder if (folder / "state.json").is_file() else None


def _field_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise InputError(_no_field(field, list(row), where))
    return _text_of(row[field], field, where)


def _no_field(field: str, present: list[str], where: str) -> str:
    names = ", ".join(repr(name) for name in present) or "no field at all"
    return f"{where}: has no field '{field}' but {names}; set 'field' to the one with the text"


def _text_of(value: Any, field: str, where: str) -> str:
    """The text of one row; a null is a row without text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{field}' is a {type(value).__name__}, not text")
    check_characters(value, field, where)
    return value


def check_characters(text: str, field: str, where: str) -> None:
    """InputError, beginning with ``where``, if a text has what no tokenizer can read."""
    if found := HALF_A_CHARACTER.search(text):
        raise InputError(
            f"{where}: field '{field}' has half a character, \\u{ord(found[0]):04x}, at place "
            f"{found.start()}: write the other half behind it, or take it out"
        )


def _opened(path: Path) -> TextIO:
    """A file of UTF-8 text, with or without a byte order mark."""
    try:
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be read: {error.strerror or error}; make it readable, or give another file"
    )


def _decoded(path: Path, read: Callable[[], str]) -> str:
    """What ``read`` gives, if it is text."""
    try:
        piece = read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text ({error.reason}); convert it first{_convert(path)}"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if "\0" in piece:
        raise InputError(f"{path}: is a binary file (has NUL bytes); give UTF-8 text")
    return piece


def _convert(path: Path) -> str:
    """How to convert a file that says by its first bytes what it is; else empty."""
    with path.open("rb") as file:
        start = file.read(2)
    utf_16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return f": iconv -f UTF-16 -t UTF-8 {path} > converted.txt" if utf_16 else ""


def _joined(documents: Iterable[str]) -> Iterator[str]:
    """Documents with text, all but the first behind a separator."""
    separator = ""
    for document in documents:
        if document.strip():
            yield separator + document
            separator = SEPARATOR


def _some(pieces: Iterator[str], where: str) -> Iterator[str]:
    """The same pieces; an error at their end if there was nothing but white space."""
    found = False
    for piece in pieces:
        found = found or not piece.isspace()
        yield piece
    if not found:
        raise InputError(f"{where}: has no text")
