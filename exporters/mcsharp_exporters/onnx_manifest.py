"""``manifest.json`` of an exported model: what the folder holds, and whether it still does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mcsharp_exporters.graph_names import AccuracyLevel, GraphPruning, Precision
from mcsharp_exporters.manifest_file import format_of, read_manifest_of
from mcsharp_sdk.checked_files import file_hash
from mcsharp_sdk.errors import InputError, InputProblems, Problem
from mcsharp_sdk.folders import MANIFEST_FILE

FORMAT = "mcsharp.onnx_model"
GRAPH, DATA = "model.onnx", "model.onnx.data"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


class FileEntry(BaseModel):
    """A file of the folder: its size and what it must hash to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FileName
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModelManifest(BaseModel):
    """What an exported folder says of itself.

    ``nominal_bits`` and ``stored_bits`` are those of the packed weights, or of all matrices of the
    decoder layers if none is packed; ``context_length`` is the number of positions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mcsharp.onnx_model"] = "mcsharp.onnx_model"
    version: Literal[1] = 1
    sdk_version: str
    model_type: str
    precision: Precision
    accuracy_level: AccuracyLevel
    pruning: GraphPruning
    compressed: bool
    nominal_bits: float
    stored_bits: float
    parameters: Annotated[int, Field(gt=0)]
    layers: Annotated[int, Field(gt=0)]
    cache_heads: Annotated[int, Field(gt=0)]
    head_size: Annotated[int, Field(gt=0)]
    vocabulary: Annotated[int, Field(gt=0)]
    context_length: Annotated[int, Field(gt=0)]
    opset: int
    ir_version: int
    files: Annotated[list[FileEntry], Field(min_length=2)]

    def entry(self, name: str) -> FileEntry:
        """The file of a name; InputError if the manifest does not have it."""
        found = next((entry for entry in self.files if entry.file == name), None)
        if found is None:
            raise InputError(f"{MANIFEST_FILE} names no {name}")
        return found


def is_exported_model(folder: Path) -> bool:
    """Whether a folder says that it holds an exported model."""
    return format_of(folder) == FORMAT


def read_manifest(folder: Path) -> ModelManifest:
    """The folder's manifest, checked; InputError as of :func:`read_manifest_of`."""
    return read_manifest_of(ModelManifest, folder, "an ONNX model")


def check_files(folder: Path, manifest: ModelManifest, *, hashes: bool) -> None:
    """Check that the files are those that were written.

    Parameters
    ----------
    hashes : read every file and compare its SHA-256; otherwise only sizes are compared.

    Raises
    ------
    InputProblems
        With every file that is missing, cut short or changed.
    """
    if problems := list(_problems(folder, manifest, hashes)):
        raise InputProblems(str(folder), problems)


def _problems(folder: Path, manifest: ModelManifest, hashes: bool) -> Iterator[Problem]:
    for entry in manifest.files:
        path = folder / entry.file
        if not path.is_file():
            yield Problem(entry.file, f"missing; {_together(entry.file)}")
        elif (size := path.stat().st_size) != entry.bytes:
            state = "cut short" if size < entry.bytes else "too long"
            yield Problem(
                entry.file,
                f"{state}: {size} bytes, {MANIFEST_FILE} says {entry.bytes}; copy it again",
            )
        elif hashes and file_hash(path) != entry.sha256:
            yield Problem(entry.file, f"damaged: its SHA-256 is not the one in {MANIFEST_FILE}")


def _together(name: str) -> str:
    if name == DATA:
        return f"the weights of {GRAPH} are in it: keep both in the same folder"
    return f"{MANIFEST_FILE} names it: copy the whole folder"


def file_entry(path: Path) -> FileEntry:
    """A file as the manifest names it."""
    return FileEntry(file=path.name, bytes=path.stat().st_size, sha256=file_hash(path))
