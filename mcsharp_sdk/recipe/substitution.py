"""``${NAME}`` and ``${NAME:-default}`` in the values of a recipe; ``$$`` is a dollar sign.

References are put aside before the YAML is parsed and their values put in afterwards. So a value
from outside can never become YAML syntax, and a reference needs no quotes inside ``{…}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_REFERENCE = re.compile(r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}\r\n]*))?\}")
_PRIVATE_USE = range(0xE000, 0xF8FF)


class Unresolved(ValueError):
    """A reference that has no value or is not well formed; the message says what to do."""


@dataclass(frozen=True)
class References:
    """The references of a text, each replaced by ``mark``, its number and ``mark``."""

    masked: str
    mark: str
    found: tuple[tuple[str, str, str | None], ...]

    @classmethod
    def put_aside(cls, text: str) -> References:
        mark = next((chr(c) for c in _PRIVATE_USE if chr(c) not in text), "")
        found: list[tuple[str, str, str | None]] = []

        def mask(match: re.Match[str]) -> str:
            if match[0] == "$$":
                return "$$"
            found.append((match[0], match[1], match[2]))
            return f"{mark}{len(found) - 1}{mark}"

        return cls(_REFERENCE.sub(mask, text) if mark else text, mark, tuple(found))

    def restore(self, text: str) -> str:
        """The text with its references as they were written."""

        def written(match: re.Match[str]) -> str:
            return self.found[int(match[1])][0] if self._refers(match) else match[0]

        return self._pattern.sub(written, text)

    def substitute(self, text: str, environ: Mapping[str, str]) -> str:
        """The text with the references' values.

        Raises
        ------
        Unresolved
            If a variable is not set and has no default, or ``${`` begins no valid reference.
        """

        def value(match: re.Match[str]) -> str:
            if self._refers(match):
                return _value(*self.found[int(match[1])], environ)
            if match[0] == "${":
                raise Unresolved(
                    "'${' begins no reference: write ${NAME} or ${NAME:-default}, "
                    "or $${ for the characters themselves"
                )
            return "$" if match[0] == "$$" else match[0]

        return self._pattern.sub(value, text)

    def _refers(self, match: re.Match[str]) -> bool:
        return match[1] is not None and int(match[1]) < len(self.found)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{self.mark}([0-9]{{1,6}}){self.mark}|\$\$|\$\{{")


def _value(written: str, name: str, default: str | None, environ: Mapping[str, str]) -> str:
    value = environ.get(name, "")
    if default is not None:
        return value or default
    if name not in environ:
        raise Unresolved(f"the environment has no '{name}': set it, or write ${{{name}:-default}}")
    return value


def escaped(text: str) -> str:
    """The text as it must be written so that nothing in it is taken for a reference."""
    return text.replace("$", "$$")
