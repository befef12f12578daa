"""Finding one's way in the schema: the field of a path, and all keys with the blocks they stand in."""

from collections.abc import Iterator
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from msft.config.block import Block
from msft.config.markers import Refused, Unused
from msft.config.schema import Recipe
from msft.config.yaml_lines import Keys


def fields_of(block: type[Block]) -> dict[str, FieldInfo]:
    """Return a block's fields by their YAML names."""
    return {field.alias or name: field for name, field in block.model_fields.items()}


def blocks_in(annotation: Any) -> list[type[Block]]:
    """Return the block classes that a field's type names, inside lists and unions too."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, Block) else []
    if get_origin(annotation) in (dict, None) and not isinstance(annotation, UnionType):
        return []
    return [block for part in get_args(annotation) for block in blocks_in(part)]


def blocks_at(path: Keys) -> list[type[Block]]:
    """Return the block classes that may stand at `path`; list indices are stepped over."""
    blocks: list[type[Block]] = [Recipe]
    for key in path:
        if not isinstance(key, int):
            fields = [fields_of(block)[key] for block in blocks if key in fields_of(block)]
            blocks = [inner for field in fields for inner in blocks_in(field.annotation)]
    return blocks


def keys_at(path: Keys) -> list[str]:
    """Return the keys that the block at `path` knows."""
    return list(dict.fromkeys(key for block in blocks_at(path) for key in fields_of(block)))


def field_at(path: Keys) -> FieldInfo | None:
    """Return the field at `path`, or None when the schema has none."""
    if not path or isinstance(path[-1], int):
        return None
    found = [fields_of(block).get(path[-1]) for block in blocks_at(path[:-1])]
    return next((field for field in found if field), None)


def is_text(path: Keys) -> bool:
    """Whether the value at `path` is plain text, so that a word of the command line is taken as it is."""
    field = field_at(path)
    return field is not None and (field.annotation is str or field.annotation == (str | None))


def used_keys(block: type[Block] = Recipe, path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield (block's path, key) of every key that has a meaning here."""
    for key, field in fields_of(block).items():
        if not any(isinstance(mark, Unused | Refused) for mark in field.metadata):
            yield path, key
            for inner in blocks_in(field.annotation):
                yield from used_keys(inner, (*path, key))
