"""Stages and exporters by name, found through entry points; anyone can add to them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from mcsharp_exporters.base import Exporter
from pydantic import BaseModel

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.document import suggestion

Element = TypeVar("Element", bound=BaseModel)


class PluginError(InputError):
    """A stage or exporter is unknown, offered twice, or cannot be imported."""


@dataclass(frozen=True)
class Registry(Generic[Element]):
    """What is offered under one entry point group.

    Parameters
    ----------
    group : the entry point group.
    base : the class that each offer must derive from.
    noun : what one is called in messages.
    """

    group: str
    base: type[BaseModel]
    noun: str

    def names(self) -> tuple[str, ...]:
        """Names on offer, sorted; nothing is imported."""
        return tuple(sorted({offer.name for offer in _offers(self.group, tuple(sys.path))}))

    def load(self, name: str) -> type[Element]:
        """The class that goes by ``name``.

        Raises
        ------
        PluginError
            If the name is unknown, two packages offer it, or what is offered cannot be used.
        """
        offers = [o for o in _offers(self.group, tuple(sys.path)) if o.name == name]
        if not offers:
            near = suggestion(name, self.names(), otherwise="there are ")
            raise PluginError(f"unknown {self.noun} '{name}'{near}")
        if len({offer.value for offer in offers}) > 1:
            owners = " and ".join(sorted(_owner(offer) for offer in offers))
            raise PluginError(f"{self.noun} '{name}' is offered by {owners}: uninstall one of them")
        return self._usable(offers[0])

    def usable(self) -> Iterator[tuple[str, type[Element] | None]]:
        """All names with their classes, ``None`` for those that cannot be imported."""
        for name in self.names():
            try:
                yield name, self.load(name)
            except PluginError:
                yield name, None

    def _usable(self, offer: EntryPoint) -> type[Element]:
        title = f"{self.noun} '{offer.name}' of {_owner(offer)}"
        try:
            found: Any = offer.load()
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise PluginError(f"{title} cannot be imported: {cause}") from error
        if not inspect.isclass(found) or not issubclass(found, self.base):
            raise PluginError(f"{title} is no {self.base.__name__}: {offer.value}")
        if inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))
            raise PluginError(f"{title} lacks {missing}")
        if found.model_fields["type"].default != offer.name:
            raise PluginError(f"{title} calls itself '{found.model_fields['type'].default}'")
        return cast(type[Element], found)


@lru_cache(maxsize=8)
def _offers(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """All entry points of a group; ``path`` is the module search path that they are found on."""
    return tuple(entry_points(group=group))


def _owner(offer: EntryPoint) -> str:
    return f"{offer.dist.name} {offer.dist.version}" if offer.dist else offer.value


MODIFIERS: Registry[Modifier] = Registry("mcsharp_sdk.modifiers", Modifier, "stage")
EXPORTERS: Registry[Exporter] = Registry("mcsharp_sdk.exporters", Exporter, "exporter")
