"""A family's own files under canonical names: prefixes put back, tensors renamed, joined ones taken apart."""

from msft.convert import joined, stored
from msft.convert.joined import Joined, Piece
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored
from msft.errors import InputError
from msft.models.experts import row_count
from msft.models.families import family
from msft.models.family import FileNames, Rows
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

# What old releases saved beside weights: causal masks.
_MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def canonical(entries: dict[str, Stored | Joined], spec: ModelSpec) -> dict[str, Stored | Joined]:
    """Return the tensors of a Hugging Face file by canonical name; what the family does not know keeps its name."""
    names = family(spec.family).files
    entries = _with_originals(entries, names)
    entries = _with_prefixes({name: entry for name, entry in entries.items() if not _is_mask(name, entry)}, names)
    return taken_apart(entries, names.tensors(spec), spec)


def taken_apart(
    entries: dict[str, Stored | Joined], layout: dict[str, tuple[Rows, ...]], spec: ModelSpec
) -> dict[str, Stored | Joined]:
    """Return the model's tensors, made of what `layout` says that tensors of a file hold; others keep their names."""
    found: dict[str, Stored | Joined] = {}
    parts: dict[str, list[tuple[int, Stored | Joined]]] = {}
    shapes = tensor_shapes(spec)
    for name, entry in entries.items():
        held = layout.get(name)
        if held is None or not _holds(entry, held):
            found[name] = entry
            continue
        if len(held) == 1 and held[0] == Rows(held[0].tensor, 0, row_count(shapes[held[0].tensor])):
            # As it is: only what is taken apart or put together has to lie row by row.
            parts.setdefault(held[0].tensor, []).append((0, entry))
            continue
        entry, at = flat(entry, name), 0
        for rows in held:
            size = rows.stop - rows.start
            parts.setdefault(rows.tensor, []).append((rows.start, _rows(entry, at, at + size)))
            at += size
    return found | {name: _whole(name, shapes[name], pieces) for name, pieces in parts.items()}


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
    return bool(entry.info.shape) and row_count(entry.info.shape) == sum(rows.stop - rows.start for rows in held)


def flat(entry: Stored | Joined, name: str) -> Stored | Joined:
    """Return a tensor with all its axes but the last as one; it raises InputError for slices of a stacked one."""
    shape = entry.info.shape
    if len(shape) < 3:
        return entry
    if isinstance(entry, Joined) or entry.strides is not None:
        raise InputError(
            f"{joined.file_of(entry)}: tensor {name!r} {list(shape)} lies in slices, which are not read yet"
        )
    return entry._replace(info=TensorInfo((row_count(shape), shape[-1]), entry.info.dtype))


def _rows(entry: Stored | Joined, start: int, stop: int) -> Stored | Joined:
    return entry if stop - start == entry.info.shape[0] else joined.rows(entry, start, stop)


def _whole(name: str, shape: tuple[int, ...], pieces: list[tuple[int, Stored | Joined]]) -> Stored | Joined:
    """The tensor of that shape that consists of rows; it raises InputError where matrices of experts do not make it."""
    if len(shape) < 3 or len(pieces) == 1 and row_count(pieces[0][1].info.shape) == row_count(shape):
        return _together(pieces)
    pieces = sorted(pieces, key=lambda piece: piece[0])
    where, first = joined.file_of(pieces[0][1]), _first_gap(pieces)
    if any(isinstance(entry, Joined) for _, entry in pieces):
        raise InputError(f"{where}: the experts of {name!r} lie in slices, which are not read yet")
    kinds = sorted({f"{entry.info.dtype}, {entry.info.shape[-1]} wide" for _, entry in pieces})
    if len(kinds) > 1 or pieces[0][1].info.shape[-1] != shape[-1]:
        found, wide = " and ".join(kinds), shape[-1]
        raise InputError(f"{where}: experts of {name!r} are {found}, they must be {wide} wide and of one dtype")
    if first < row_count(shape):
        raise InputError(f"{where}: {name!r} lacks matrices, first one of expert {first // shape[1]}")
    return _stacked(shape, pieces)


def _first_gap(pieces: list[tuple[int, Stored | Joined]]) -> int:
    """The first row that no piece has."""
    expected = 0
    for start, entry in pieces:
        if start != expected:
            break
        expected += entry.info.shape[0]
    return expected


def _stacked(shape: tuple[int, ...], pieces: list[tuple[int, Stored]]) -> Stored | Joined:
    """Matrices one after another as a tensor of three axes, of one file or of several."""
    info = TensorInfo(shape, pieces[0][1].info.dtype)
    if len({entry.file for _, entry in pieces}) == 1 and not any(entry.strides for _, entry in pieces):
        extents = tuple(extent for _, entry in pieces for extent in entry.extents)
        return stored.Stored(info, pieces[0][1].file, extents)
    slices = []
    for start, entry in pieces:
        expert, row = divmod(start, shape[1])
        strides = entry.strides and (0, *entry.strides)
        part = entry._replace(info=TensorInfo((1, *entry.info.shape), info.dtype), strides=strides)
        slices.append(Piece(part, (expert, row, 0)))
    return Joined(info, tuple(slices))


def _together(pieces: list[tuple[int, Stored | Joined]]) -> Stored | Joined:
    """Rows of one tensor as one entry, in their order."""
    entries = [entry for _, entry in sorted(pieces, key=lambda piece: piece[0])]
    if len(entries) == 1:
        return entries[0]
    info = entries[0].info
    info = TensorInfo((sum(entry.info.shape[0] for entry in entries), *info.shape[1:]), info.dtype)
    return stored.Stored(info, entries[0].file, tuple(extent for entry in entries for extent in entry.extents))
