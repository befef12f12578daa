"""A family's own files under canonical names: prefixes put back, tensors renamed, joined ones taken apart."""

from msft.convert import joined, stored
from msft.convert.joined import Joined
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored
from msft.models.families import family
from msft.models.family import FileNames, Rows
from msft.models.spec import ModelSpec

# What old releases saved beside weights: causal masks.
_MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def canonical(entries: dict[str, Stored | Joined], spec: ModelSpec) -> dict[str, Stored | Joined]:
    """Return the tensors of a Hugging Face file by canonical name; what the family does not know keeps its name."""
    names = family(spec.family).files
    layout = names.tensors(spec)
    entries = _with_originals(entries, names)
    entries = _with_prefixes({name: entry for name, entry in entries.items() if not _is_mask(name, entry)}, names)
    found: dict[str, Stored | Joined] = {}
    parts: dict[str, list[tuple[int, Stored | Joined]]] = {}
    for name, entry in entries.items():
        held = layout.get(name)
        if held is None or not _holds(entry, held):
            found[name] = entry
            continue
        at = 0
        for rows in held:
            size = rows.stop - rows.start
            parts.setdefault(rows.tensor, []).append((rows.start, _rows(entry, at, at + size)))
            at += size
    return found | {name: _together(pieces) for name, pieces in parts.items()}


def _is_mask(name: str, entry: Stored | Joined) -> bool:
    return name.endswith(_MASKS) and len(entry.info.shape) in (0, 4)


def _with_originals(entries: dict, names: FileNames) -> dict:
    """Tensors that a file holds as copies alone, by the name of what they are copies of."""
    found = dict(entries)
    for copy, original in names.copies:
        if copy in found and original not in found:
            found[original] = found.pop(copy)
    return found


def _with_prefixes(entries: dict, names: FileNames) -> dict:
    """Names with the prefixes that all tensors but the head lack in files of a model without one."""
    for prefix in names.prefixes:
        if not any(name.startswith(prefix) for name in entries):
            entries = {name if name.startswith("lm_head.") else prefix + name: of for name, of in entries.items()}
    return entries


def _holds(entry: Stored | Joined, held: tuple[Rows, ...]) -> bool:
    """Whether a tensor is as long as what it is said to hold; others are told by their own names."""
    return bool(entry.info.shape) and entry.info.shape[0] == sum(rows.stop - rows.start for rows in held)


def _rows(entry: Stored | Joined, start: int, stop: int) -> Stored | Joined:
    return entry if stop - start == entry.info.shape[0] else joined.rows(entry, start, stop)


def _together(pieces: list[tuple[int, Stored | Joined]]) -> Stored | Joined:
    """Rows of one tensor as one entry, in their order."""
    entries = [entry for _, entry in sorted(pieces, key=lambda piece: piece[0])]
    if len(entries) == 1:
        return entries[0]
    info = entries[0].info
    info = TensorInfo((sum(entry.info.shape[0] for entry in entries), *info.shape[1:]), info.dtype)
    return stored.Stored(info, entries[0].file, tuple(extent for entry in entries for extent in entry.extents))
