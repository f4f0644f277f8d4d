"""Read a whole model folder and say whether it is what was written, and numbers throughout."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mcsharp_sdk.arguments import AnyPath, model_path
from mcsharp_sdk.checked_files import CHECKSUMS_FILE, changed_files, read_checksums
from mcsharp_sdk.errors import InputError, InputProblems, Problem, raise_problems
from mcsharp_sdk.evaluation.stored import read_config_json, read_layout
from mcsharp_sdk.folders import CONFIG_FILE
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.weight_checks import numbers_of
from mcsharp_sdk.runtime.stored_model import check_compressed

NO_CHECKSUMS = f"no {CHECKSUMS_FILE}: whether files are as written cannot be told"


@dataclass(frozen=True)
class Verification:
    """What was looked at, and found to be right.

    Attributes
    ----------
    model : the folder.
    compressed : whether its tensors were compared with what its config says.
    checksums : files that have the checksum of ``SHA256SUMS``; 0 if the folder has none.
    tensors : how many were read.
    """

    model: str
    compressed: bool
    checksums: int
    tensors: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def verify(model: AnyPath) -> Verification:
    """Read every byte of a model folder, original or compressed, and check what can be checked.

    Files are compared with ``SHA256SUMS`` where there is one, headers with the config of a
    compressed model, and all numbers must be finite. A flipped bit in a file without a checksum
    shows only if it makes a header wrong or a number NaN or infinite.

    Raises
    ------
    InputError
        With every file and tensor that is wrong.
    """
    folder = model_path(model)
    compressed = read_layout(read_config_json(folder), folder) is not None
    sums = read_checksums(folder)
    problems = changed_files(folder, sums)
    try:
        if compressed:
            check_compressed(folder)
        checkpoint = Checkpoint.open(folder)
    except InputProblems as error:
        raise InputProblems(str(folder), [*problems, *error.problems], error.more) from None
    except InputError as error:  # the config describes another model
        raise InputProblems(str(folder), [*problems, Problem(CONFIG_FILE, str(error))]) from None
    for name in checkpoint.names:
        problems += numbers_of(checkpoint, name)
    raise_problems(str(folder), problems)
    return Verification(str(folder), compressed, len(sums), len(checkpoint.names))
