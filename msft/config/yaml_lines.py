"""YAML that remembers where every key and value stands.

Format: YAML as PyYAML's safe loader reads it, except that `1e-5`, `1.e-5` and `1.E-4` are numbers, and that
dates, sexagesimal and octal numbers are plain text. A key that stands twice in a block is a problem.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from msft.errors import InputError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 20_000
MAX_DIGITS = 24

Keys = tuple[str | int, ...]


class Place(NamedTuple):
    """Where something stands: `order` sorts, `text` is what the user reads, such as 'lora.yaml:7' or '--epochs'."""

    order: int
    text: str


class Problem(NamedTuple):
    """Something wrong at a place; `path` is the dotted path it is about ('' when there is none)."""

    place: Place
    path: str
    message: str

    def __str__(self) -> str:
        about = f" {self.path}:" if self.path and self.place.text.removeprefix("--") != self.path else ""
        return f"{self.place.text}:{about} {self.message}"


@dataclass
class Document:
    """Plain data, and the place of each key and value by its path from the root; a block stands where its key does."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Keys, Place] = field(default_factory=dict)
    values: dict[Keys, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Keys, of_key: bool = False) -> Place:
        """Return where `path`, or the nearest block around it, stands."""
        places = self.keys if of_key else self.values
        while path:
            found = places.get(path) or self.values.get(path)
            if found:
                return found
            path = path[:-1]
        return Place(0, self.name)


def dotted(path: Keys) -> str:
    """Return a path as users write it: 'callbacks.1.prefix'; odd keys are quoted and cut."""
    return ".".join(readable(str(key)) for key in path)


def readable(word: str) -> str:
    """Return a word as it may stand in a message: quoted and cut when it is empty, long or not printable."""
    return word if word.strip() == word != "" and word.isprintable() and len(word) <= 60 else _short(word)


def read_yaml(path: str | Path) -> Document:
    """Read one YAML file whose top level is a block of keys.

    Raises InputError with file and line when it cannot be read at all; what is wrong with single keys is
    returned in `problems`.
    """
    name = str(path)
    text = _read_text(Path(path), name)
    root = _compose(text, name)
    if root is None:
        raise InputError(f"{name}: the file holds no keys")
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{name}:{root.start_mark.line + 1}: the top level must be a block of keys")
    document = Document(name)
    document.data = _Builder(document).value(root, ())
    return document


def parse_value(text: str) -> Any:
    """Read a word of the command line as a YAML scalar, list or mapping; what is no YAML is plain text."""
    document = Document("")
    try:
        root = _compose(text, "")
        value = text if root is None else _Builder(document).value(root, ())
    except InputError:
        return text
    return text if document.problems or isinstance(value, dict) and not text.lstrip().startswith("{") else value


def _read_text(path: Path, name: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{name!r}: is no file name") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{name}: is larger than {MAX_BYTES // 1024} KiB, so it is no recipe")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{name}:{line}: is not UTF-8 text") from None
    # JSON is YAML but for the tabs that it may be indented with, which it has nowhere else.
    return text.replace("\t", " ") if text.lstrip().startswith("{") else text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other rules for what an unquoted word is."""


_INT = r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+"
_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
_SPECIAL = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":", 1)[1] in ("bool", "null", "merge")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^(?:{_INT})$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT}|{_SPECIAL})$"), list("-+0123456789.")
)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes texts that the loader above would take for numbers."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # YAML counts U+0085 as a line break, and readers make "\n" of it unless it is escaped in double quotes.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


_Dumper.add_representer(str, _text)


def write_yaml(data: dict[str, Any]) -> str:
    """Return plain data as YAML, keys in their order, that `read_yaml` and PyYAML read back as it is."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{name}{line}: is no YAML: {_one_line(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise InputError(f"{name}:{line}: is no YAML: the character {error.character!r} is not allowed") from None
    except (RecursionError, ValueError, yaml.YAMLError):
        raise InputError(f"{name}: is no YAML that can be read (nested too deeply, or a broken escape)") from None


def _one_line(error: yaml.MarkedYAMLError) -> str:
    return ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)


_KINDS = {"bool": "boolean", "int": "whole number", "float": "number"}


class _Builder:
    """Turns nodes into data; counts values so that aliases cannot multiply without bound."""

    def __init__(self, document: Document):
        self.document = document
        self.left = MAX_VALUES

    def value(self, node: yaml.Node, path: Keys) -> Any:
        self.left -= 1
        if self.left < 0 or len(path) > MAX_DEPTH:
            where = f"{self.document.name}:{node.start_mark.line + 1}"
            raise InputError(f"{where}: the recipe is too large or too deep (aliases that repeat each other?)")
        is_block = not isinstance(node, yaml.ScalarNode)
        self.document.values[path] = is_block and self.document.keys.get(path) or self._place(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, path, ("seq",))
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Keys) -> dict[str, Any]:
        self._check_tag(node, path, ("map",))
        result = {}
        for key_node, value_node in self._pairs(node, path):
            key = key_node.value
            inner = (*path, key)
            self.document.keys[inner] = self._place(key_node)
            result[key] = self.value(value_node, inner)
        return result

    def _pairs(self, node: yaml.MappingNode, path: Keys, depth: int = 0) -> list[tuple[yaml.Node, yaml.Node]]:
        """The block's own pairs in order, with those that `<<` merges in where the block lacks them."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag.endswith(":merge"):
                for pair in self._merged(value_node, path, depth):
                    merged.setdefault(pair[0].value, pair)
            elif not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                shown = getattr(key_node, "value", "") if isinstance(key_node, yaml.ScalarNode) else "a block"
                self._problem(key_node, path, f"the key {shown} must be text (put it in quotes)")
            elif key_node.value in own:
                first = own[key_node.value][0].start_mark.line + 1
                self._problem(key_node, (*path, key_node.value), f"stands twice (first in line {first})")
            else:
                own[key_node.value] = (key_node, value_node)
        return list({**merged, **own}.values())

    def _merged(self, node: yaml.Node, path: Keys, depth: int) -> list[tuple[yaml.Node, yaml.Node]]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        self.left -= len(sources)
        if depth > MAX_DEPTH or self.left < 0:
            raise InputError(f"{self._place(node).text}: '<<' merges a block into itself, or too many")
        pairs = []
        for source in sources:
            if isinstance(source, yaml.MappingNode):
                pairs += self._pairs(source, path, depth + 1)
                self.left -= len(source.value)
            else:
                self._problem(node, path, "'<<' takes a block (*name) or a list of blocks")
        return pairs

    def _scalar(self, node: yaml.ScalarNode, path: Keys) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "str" or kind == "merge":
            return node.value
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return yaml.SafeLoader.bool_values[node.value.lower()]
            if kind == "int" and len(node.value) <= MAX_DIGITS:
                return int(node.value.replace("_", ""), 0)
            if kind == "float":
                return float(node.value.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):
            pass
        if kind in ("bool", "int", "float"):
            self._problem(node, path, f"{_short(str(node.value))} is no {_KINDS[kind]} of sensible size")
        else:
            self._check_tag(node, path, ())
        return None

    def _check_tag(self, node: yaml.Node, path: Keys, allowed: tuple[str, ...]) -> None:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in allowed:
            self._problem(node, path, f"the tag {_short(node.tag)} is not allowed in a recipe")

    def _place(self, node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return Place(line, f"{self.document.name}:{line}")

    def _problem(self, node: yaml.Node, path: Keys, message: str) -> None:
        self.document.problems.append(Problem(self._place(node), dotted(path), message))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
