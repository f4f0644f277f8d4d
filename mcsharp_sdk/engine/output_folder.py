"""Whether a folder may be made, or replaced, as the output of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mcsharp_sdk.artifact_file import TEMPORARY_FILES, read_json_object
from mcsharp_sdk.checked_files import CHECKSUMS_FILE, UNSUMMED_FILES, read_checksums
from mcsharp_sdk.errors import InputError, some_of
from mcsharp_sdk.folders import (
    EVALUATION_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    check_folder_to_make,
    run_folder_of,
)
from mcsharp_sdk.recipe.schema import Recipe

RESULT_FILES = (REPORT_FILE, f"onnx_routers/{MANIFEST_FILE}", f"onnx_model/{MANIFEST_FILE}")
"""A folder with one of these was written by an exporter."""

BEGUN = frozenset(
    f".{Path(name).parent}.{state}"
    for name in RESULT_FILES[1:]
    for state in ("partial", "old", "lock")
)
"""Names beside exports that a killed one has left."""

LATER_FILES = (CHECKSUMS_FILE, *UNSUMMED_FILES, EVALUATION_FILE)
"""Files of a result that its checksums do not name, or that commands after the run add."""


def default_run_directory(output: Path, recipe: Recipe) -> Path:
    """A hidden folder beside the output, or the output where nothing else will be there.

    ``output`` is absolute.
    """
    if not output.name:
        raise InputError(f"{output} cannot be replaced: give a folder to make as --output")
    return run_folder_of(output) if recipe.exports else output


def check_output(output: Path, model: Path, run_directory: Path, overwrite: bool) -> None:
    """InputError if a folder cannot become the output, or holds what is not ours to replace.

    --overwrite is suggested only where it would work.
    """
    check_target(output)
    if _lies_in(model, output):
        raise InputError(
            f"the model {model} lies in the output {output}, which would be replaced: give another "
            "--output"
        )
    if _lies_in(run_directory, output):
        raise InputError(
            f"the run directory {run_directory} must not lie in the output {output}: give another "
            "--run-dir"
        )
    if output.exists():
        check_replaceable(output)
        if not overwrite:
            raise InputError(f"{output} exists already; give --overwrite to replace it")


def check_target(output: Path) -> None:
    """InputError if no folder can be renamed to a path, whatever is in the one that is there."""
    if output.is_symlink():
        raise InputError(
            f"{output} is a link, which would be replaced: give the folder that it leads to, "
            f"{output.resolve()}"
        )
    check_folder_to_make(output)


def check_replaceable(folder: Path) -> None:
    """InputError unless a folder is empty, or holds a result of mcsharp and no file of others."""
    if not any(folder.iterdir()):
        return
    if not is_result(folder):
        raise InputError(
            f"{folder} holds something else than a result of mcsharp, so it is not overwritten; "
            "give another --output, or empty the folder yourself"
        )
    strangers = sorted(_strangers(folder))
    if strangers:
        raise InputError(
            f"{folder} also holds {some_of(strangers)}, which the run that made it did not write "
            f"({CHECKSUMS_FILE} does not name them), so it is not overwritten; move them "
            "elsewhere, or give another --output"
        )


def is_result(folder: Path) -> bool:
    """Whether an exporter wrote a folder."""
    return any((folder / name).is_file() for name in RESULT_FILES)


def _lies_in(path: Path, folder: Path) -> bool:
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


def _strangers(folder: Path) -> Iterator[str]:
    """Files of a result, relative to it, that mcsharp did not write."""
    known = {*LATER_FILES, *read_checksums(folder)}
    for manifest in folder.glob(f"*/{MANIFEST_FILE}"):
        known |= {f"{manifest.parent.name}/{name}" for name in _exported(manifest)}
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        begun = name.partition("/")[0] in BEGUN
        ours = name in known or begun or file.match(TEMPORARY_FILES)
        if not ours and (file.is_symlink() or not file.is_dir()):
            yield name


def _exported(manifest: Path) -> set[str]:
    """The manifest that ``mcsharp export`` wrote, and the files that it names; else nothing."""
    try:
        content = read_json_object(manifest)
    except InputError:
        return set()
    if not str(content.get("format")).startswith("mcsharp."):
        return set()
    entries = [e for key in ("files", "layers") if isinstance(e := content.get(key), list)]
    named = (entry.get("file") for of_key in entries for entry in of_key if isinstance(entry, dict))
    return {MANIFEST_FILE, *(str(name) for name in named)}
