"""What every exporter has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, Field

from mcsharp_sdk.arguments import LONG_DTYPES
from mcsharp_sdk.settings import Settings

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.errors import Problem
    from mcsharp_sdk.modifiers.base import Modifier


FILE_SUFFIXES = (
    *(".html", ".jinja", ".json", ".md", ".model", ".safetensors", ".svg", ".txt"),
    *(".yaml", "SHA256SUMS"),
)
"""How names of the files end that lie in an output beside folders."""


def off(value: Any) -> Any:
    """YAML reads a plain ``off`` as false."""
    return "off" if value is False else value


def with_long_names(choice: Any) -> dict[str, Any]:
    """What a JSON schema says of a setting that ``short_dtype`` reads."""
    short = get_args(choice)
    return {"enum": [*short, *(LONG_DTYPES[name] for name in short)]}


def _not_a_file(folder: str) -> str:
    for suffix in FILE_SUFFIXES:
        if folder.lower().endswith(suffix.lower()):
            raise ValueError(
                f"folder {folder!r} is named like a file: do not let it end in {suffix}"
            )
    return folder


FolderName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="Folder inside the output."),
    AfterValidator(_not_a_file),
]


class Exporter(Settings, ABC):
    """A way to write a finished run down; its fields are the settings.

    Class attributes
    ----------------
    reads : names of the artifacts that the exporter needs from the stages.
    reads_any : names of artifacts of which it needs at least one; empty if it needs none.
    reads_routing : the exporter needs to know how the model's routers choose.
    writes_weights : the exporter writes all weights of the model down.
    """

    type: str

    reads: ClassVar[tuple[str, ...]] = ()
    reads_any: ClassVar[tuple[str, ...]] = ()
    reads_routing: ClassVar[bool] = False
    writes_weights: ClassVar[bool] = False

    def needs(self) -> tuple[str, ...]:
        """Artifacts needed with these settings; ``reads`` unless settings add to it."""
        return self.reads

    def check_stages(self, stages: Sequence[Modifier]) -> list[Problem]:
        """What cannot be exported of what these stages will make.

        ``where`` of each problem is the name of the setting that it is about.
        """
        return []

    def check_model(self, config: Any) -> list[Problem]:
        """What cannot be exported of a model with this config of transformers."""
        return []

    @abstractmethod
    def run(self, context: RunContext, output: Path) -> None:
        """Write into ``output``, a folder that users see once all exporters are done."""
