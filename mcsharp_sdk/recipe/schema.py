"""The recipe: calibration, a list of stages, a list of exporters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PrivateAttr,
    field_validator,
    model_validator,
)

from mcsharp_sdk.arguments import AnyPath, optional_path, path_argument, shown
from mcsharp_sdk.data.calibration import Calibration
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.recipe.consistency import misfits
from mcsharp_sdk.recipe.document import Document, Finding, Location
from mcsharp_sdk.recipe.elements import CalibrationSettings, Export, Stage, errors_at
from mcsharp_sdk.recipe.load import checked, read_text
from mcsharp_sdk.recipe.overrides import Overrides, apply_overrides, override_texts
from mcsharp_sdk.recipe.quality import Quality, with_quality
from mcsharp_sdk.recipe.yaml_text import dump, parse
from mcsharp_sdk.settings import refuse_truth_for_number

_DEFAULT_EXPORTS: Any = ({"type": "safetensors"},)


class Recipe(BaseModel):
    """What to do to a model: stages in order, and how to write the result down.

    A recipe is checked when it is made: a stage finds what it needs among what earlier stages
    make. With :meth:`from_file`, :meth:`from_text` and :meth:`from_dict` files that it names exist
    (they may be relative to the recipe's folder), and what is wrong is an ``InputProblems``. Made
    of settings directly it raises pydantic's ``ValidationError``, a ``ValueError``; relative paths
    start at the current folder, and ``compress`` checks that files exist.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Annotated[Literal[1], Field(description="Version of the recipe format.")]
    quality: Annotated[
        Quality,
        Field(
            description="How much time is spent for how good a result: it changes defaults of "
            "stages, see below."
        ),
    ] = "balanced"
    calibration: Annotated[
        CalibrationSettings | None,
        Field(description="What the stages measure with: a source, or a list of sources."),
    ] = None
    stages: Annotated[
        Sequence[Stage],
        GetPydanticSchema(lambda _, schema: schema(tuple[Stage, ...])),
        Field(description="The work, in this order."),
    ]
    exports: Annotated[
        Sequence[Export],
        GetPydanticSchema(lambda _, schema: schema(tuple[Export, ...])),
        Field(description="Ways to write the result down.", validate_default=True),
    ] = _DEFAULT_EXPORTS

    _version = field_validator("version", mode="before")(refuse_truth_for_number)

    _name: str = PrivateAttr(default="recipe")
    _as_run: str = PrivateAttr(default="")
    _document: Document | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _quality_written_out(cls, data: Any) -> Any:
        return with_quality(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if not self.stages:
            raise errors_at((("stages",), "at least one stage is needed"))
        found = misfits(
            self.stages,
            self.exports,
            calibrated=self.calibration is not None,
            exports_given="exports" in self.model_fields_set,
        )
        if found:
            raise errors_at(*((finding.location, finding.message) for finding in found))
        return self

    @classmethod
    def from_file(
        cls,
        path: AnyPath,
        overrides: Overrides = (),
        environ: Mapping[str, str] = os.environ,
    ) -> Recipe:
        """Read a recipe file.

        Parameters
        ----------
        path : the YAML file; file names in it are relative to its folder.
        overrides : assignments such as ``stages.BitAllocation.target_bits=2.0``, or a mapping from
            settings to values.
        environ : where ``${NAME}`` in the file's values is looked up.

        Raises
        ------
        InputProblems
            With everything that is wrong, each with its line.
        """
        path = path_argument(path, "path", "the recipe file")
        text = read_text(path)
        folder = path.absolute().parent
        return cls.from_text(text, str(path), overrides=overrides, environ=environ, base=folder)

    @classmethod
    def from_text(
        cls,
        text: str,
        name: str = "recipe.yaml",
        *,
        overrides: Overrides = (),
        environ: Mapping[str, str] = os.environ,
        base: AnyPath | None = None,
    ) -> Recipe:
        """Read a recipe from YAML text; relative file names start in ``base`` (default: here)."""
        if not isinstance(text, str):
            raise InputError(f"text is a recipe in YAML, not {shown(text)}: from_file reads a file")
        document = parse(text, Path(name).name or name, name, environ)
        return cls._checked(document, overrides, base)

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        overrides: Overrides = (),
        base: AnyPath | None = None,
    ) -> Recipe:
        """Make a recipe of plain data; relative file names start in ``base`` (default: here)."""
        if not isinstance(data, Mapping):
            raise InputError(
                f"data is a mapping such as {{'version': 1, 'stages': [...]}}, not {shown(data)}: "
                "from_text reads YAML, and from_file a file"
            )
        return cls._checked(Document("", "recipe", data=deepcopy(dict(data))), overrides, base)

    @classmethod
    def _checked(cls, document: Document, overrides: Overrides, base: AnyPath | None) -> Recipe:
        folder = optional_path(base, "base", "the folder that file names start in")
        apply_overrides(document, override_texts(overrides))
        recipe = checked(document, folder or Path.cwd(), cls)
        recipe._document = document
        recipe._name = document.subject
        if document.text:
            recipe._as_run = dump(document.data) if document.changed else document.text
        return recipe

    @property
    def sources(self) -> tuple[Calibration, ...]:
        """The sources of the calibration, each with its number of sequences."""
        if self.calibration is None:
            return ()
        return self.calibration if isinstance(self.calibration, tuple) else (self.calibration,)

    def source_location(self, index: int) -> Location:
        """Where a source stands in the recipe."""
        return ("calibration", index) if isinstance(self.calibration, tuple) else ("calibration",)

    @property
    def name(self) -> str:
        """The file that the recipe was read from, as it was given."""
        return self._name

    @property
    def as_run(self) -> str:
        """YAML text of the recipe as it runs.

        The text that it was read from, comments and all, if nothing was changed by overrides or the
        environment; else what was written with those changes put in.
        """
        return self._as_run or dump(self.settings())

    def error(self, misfits: Iterable[tuple[Location, str]]) -> InputProblems:
        """What is found wrong with a finished recipe, as one error with places in its file.

        Parameters
        ----------
        misfits : location of the entry, e.g. ``("stages", 1, "target_bits")``, and message.
        """
        document = self._document or Document("", self._name)
        return document.error(Finding(location, message) for location, message in misfits)

    def settings(self) -> dict[str, Any]:
        """All settings as plain data, defaults and absolute paths included: for fingerprints."""
        return self.model_dump(mode="json")
