"""YAML text into plain data with a line number for every key and value, within limits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.resolver import Resolver

from mcsharp_sdk.recipe.document import Document, Location, Place, path_text
from mcsharp_sdk.recipe.substitution import References, Unresolved, escaped

MAX_CHARACTERS = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_SCALARS = {
    _TAG + "str": "text",
    _TAG + "int": "whole number",
    _TAG + "float": "number",
    _TAG + "bool": "truth value",
    _TAG + "null": "null",
}
"""Tags of the scalars that a recipe may hold, and what they are called in messages."""

_KEYS = (_TAG + "str", _TAG + "int")
"""Tags of the keys that a mapping may have; a number is taken as it is written."""

_HINTS = {
    "cannot start any token": "indent with spaces, not tabs; quote a value that begins with @",
    "mapping values are not allowed": "quote a value with ': ' in it, or check the indentation",
    "expected a single document": "one file holds one recipe: remove the second '---'",
    "could not find expected ':'": "a key needs ': ' after it",
}


class _Refused(Exception):
    """Nothing in the text can be checked further; arguments: the line, and why."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that stops early on endless input; ``1e-3`` is a number, a date is text."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self.nodes += 1
        self.depth += 1
        line = self.peek_event().start_mark.line + 1
        if self.nodes > MAX_NODES:
            raise _Refused(line, f"more than {MAX_NODES} entries: this is no recipe")
        if self.depth > MAX_DEPTH:
            raise _Refused(line, f"nested more than {MAX_DEPTH} levels deep: this is no recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes all text that ``_Loader`` would take for something else."""


_EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag in (*_SCALARS, _MERGE)]
    for first, rules in Resolver.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+0123456789"))


def parse(text: str, name: str, subject: str, environ: Mapping[str, str] | None) -> Document:
    """The document of a YAML text, with what is wrong with it as far as YAML goes.

    Parameters
    ----------
    name, subject : of the document.
    environ : where ``${NAME}`` is looked up; None to leave dollar signs as they are.

    Raises
    ------
    InputProblems
        If there is nothing that could be checked further: broken YAML, or a limit is passed.
    """
    document = Document(name, subject, text)
    if len(text) > MAX_CHARACTERS:
        document.add((), f"larger than {MAX_CHARACTERS // 1024} KiB: this is no recipe", line=1)
        raise document.error(document.findings)
    references = References(text, "", ()) if environ is None else References.put_aside(text)
    try:
        root = _compose(references.masked)
        if root is not None:
            _measure(root, {})
            document.places[()] = Place(_line(root), _line(root))
            builder = _Builder(document, references, environ)
            document.data = builder.value(root, ())
    except _Refused as error:
        line, message = error.args
        document.add((), references.restore(message), line=line)
        raise document.error(document.findings) from None
    return document


def _compose(text: str) -> Node | None:
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark, begin = error.problem_mark or error.context_mark, error.context_mark
        wrong = ", ".join(part for part in (error.context, error.problem) if part)
        if mark and begin and begin.line != mark.line and "while" in wrong:
            wrong += f" (begun on line {begin.line + 1})"
        raise _Refused(mark.line + 1 if mark else 1, _syntax(wrong)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Refused(line, _syntax(f"character U+{error.character:04X} is not allowed")) from None
    except (ValueError, OverflowError):
        line = loader.line + 1 if loader is not None else 1
        raise _Refused(line, _syntax("an escape or number in it is out of range")) from None
    finally:
        if loader is not None:
            loader.dispose()


def _syntax(wrong: str) -> str:
    hint = next((hint for part, hint in _HINTS.items() if part in wrong), "")
    return f"this is not valid YAML: {wrong}" + (f" ({hint})" if hint else "")


def _measure(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Entries and depth that a node would have with its aliases written out."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise _Refused(_line(node), "an anchor that holds itself has no end")
        return size
    known[id(node)] = None
    parts = [_measure(child, known) for child in _children(node)]
    size = (1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0))
    if size[0] > MAX_NODES or size[1] > MAX_DEPTH:
        limits = f"{MAX_NODES} entries or {MAX_DEPTH} levels"
        raise _Refused(_line(node), f"with its aliases written out it has more than {limits}")
    known[id(node)] = size
    return size


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, SequenceNode):
        yield from node.value


def _line(node: Node) -> int:
    return node.start_mark.line + 1


@dataclass
class _Builder:
    """Turns measured nodes into plain data, noting places and findings in ``document``."""

    document: Document
    references: References
    environ: Mapping[str, str] | None
    scalars: SafeConstructor = field(default_factory=SafeConstructor)
    resolver: _Loader = field(default_factory=lambda: _Loader(""))

    def value(self, node: Node, location: Location) -> Any:
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, location)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self._entry(v, (*location, i), v) for i, v in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, location)
        tag = node.tag.removeprefix(_TAG)
        self.document.add(location, f"the tag '{tag}' has no meaning in a recipe", line=_line(node))
        return None

    def _entry(self, node: Node, location: Location, key: Node) -> Any:
        line = _line(node if isinstance(node, ScalarNode) else key)
        self.document.places[location] = Place(line, _line(key))
        return self.value(node, location)

    def _mapping(self, node: MappingNode, location: Location) -> dict[str, Any]:
        pairs = self._own_pairs(node, location)
        for name, pair in self._merged_pairs(node, location):
            pairs.setdefault(name, pair)
        return {
            name: self._entry(value, (*location, name), key) for name, (key, value) in pairs.items()
        }

    def _own_pairs(self, node: MappingNode, location: Location) -> dict[str, tuple[Node, Node]]:
        pairs: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                continue
            name = self.references.restore(key.value) if isinstance(key, ScalarNode) else ""
            if key.tag not in _KEYS or not name.isprintable():
                wrong = "a key should be a plain name" + (f", not {_short(name)}" if name else "")
                self.document.add(location, wrong, line=_line(key))
                continue
            if name in pairs:
                again = f"given twice, the first time on line {_line(pairs[name][0])}"
                self.document.add((*location, name), again, line=_line(key))
                continue
            pairs[name] = (key, value)
        return pairs

    def _merged_pairs(
        self, node: MappingNode, location: Location
    ) -> Iterator[tuple[str, tuple[Node, Node]]]:
        """Entries that ``<<`` brings in; those named first win."""
        for key, value in node.value:
            if key.tag != _MERGE:
                continue
            sources = value.value if isinstance(value, SequenceNode) else [value]
            for source in sources:
                if isinstance(source, MappingNode):
                    yield from self._own_pairs(source, location).items()
                    yield from self._merged_pairs(source, location)
                else:
                    self.document.add(location, "'<<' takes a mapping", line=_line(key))

    def _scalar(self, node: ScalarNode, location: Location) -> Any:
        text, tag = node.value, node.tag
        try:
            if self.environ is not None:
                text = self.references.substitute(node.value, self.environ)
            if text != node.value:
                self.document.changed = True
                if node.style is None:
                    tag = self.resolver.resolve(ScalarNode, text, (True, False))
            text.encode("utf-8")
            return _plain(self.scalars.construct_object(ScalarNode(_known(tag), text), deep=True))
        except Unresolved as error:
            wrong = str(error)
        except UnicodeEncodeError:
            wrong = "holds half a character (a lone surrogate)"
        except (ValueError, OverflowError, LookupError, yaml.YAMLError):
            wrong = f"{_short(text)} is no {_SCALARS[_known(tag)]} that can be used here"
        self.document.add(location, wrong, line=_line(node))
        return None


def _known(tag: str) -> str:
    return tag if tag in _SCALARS else _TAG + "str"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not finite")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise OverflowError("too large")
    return value


def parse_value(text: str) -> Any:
    """The value of a YAML scalar or flow text, without substitution.

    Raises
    ------
    ValueError
        If it is not valid YAML; the message says why.
    """
    from mcsharp_sdk.errors import InputProblems

    try:
        document = parse(text, "", "", None)
    except InputProblems as error:
        raise ValueError("; ".join(problem.message for problem in error.problems)) from None
    if document.findings:
        found = (f"{path_text(f.location)} {f.message}".strip() for f in document.findings)
        raise ValueError("; ".join(found))
    return document.data


def dump(data: Any) -> str:
    """Plain data as YAML text that :func:`parse` reads back as the same data."""
    return yaml.dump(_escape(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _escape(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _escape(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_escape(value) for value in data]
    return escaped(data) if isinstance(data, str) else data
