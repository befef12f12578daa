"""The pickle inside a torch.save file, read by a small machine of its own that can build tensors and nothing else.

No class is imported and no function of the file's choosing is called, so an untrusted file cannot run code.
Format: pickle protocols 2 to 5 as torch.save writes them for state dicts.
"""

import pickletools
from typing import NamedTuple

from msft.convert.dtypes import MINDSPORE, TORCH_STORAGE
from msft.errors import InputError


class Storage(NamedTuple):
    """A storage of the file: its key (the record 'data/KEY') and dtype (None = untyped bytes)."""

    key: str
    dtype: str | None


class PickledTensor(NamedTuple):
    """A tensor as torch pickles it: a storage, a dtype, and offset, shape and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    name: str


class _Refused(Exception):
    pass


_MARK = object()
_REBUILDERS = {
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: _tensor(
        storage, _expect(storage, Storage).dtype, offset, shape, strides
    ),
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, shape, strides, _grad, _hooks, dtype, *_: _tensor(
        storage, _dtype(dtype), offset, shape, strides
    ),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": lambda *pairs: _ordered(pairs),
}
_STORAGES = {
    **{f"torch.{name}": dtype for name, dtype in TORCH_STORAGE.items()},
    "torch.storage.UntypedStorage": None,
    "torch.UntypedStorage": None,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES".split()
)
_IGNORED = frozenset(("PROTO", "FRAME"))


def load(data: bytes, where: str) -> object:
    """Return what a state dict's pickle holds: dicts, lists, tuples, numbers, text and `PickledTensor`s.

    Raises InputError naming the first thing that is no part of a state dict.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except _Refused as error:
        raise InputError(f"{where}: {error}") from None
    except (ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: the pickle is damaged ({type(error).__name__}: {error})") from error
    raise InputError(f"{where}: the pickle is damaged (no end)")


class _Machine:
    """The stack and memo of a pickle being read."""

    def __init__(self):
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def step(self, name: str, argument) -> None:
        """Carry out one opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name not in _IGNORED:
            action = getattr(self, f"do_{name.lower()}", None)
            if action is None:
                raise _Refused(f"the pickle uses {name}, which no state dict needs; not read for safety")
            action(argument)

    def marked(self) -> list:
        """Take everything above the last mark off the stack."""
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def do_mark(self, _):
        self.stack.append(_MARK)

    def do_binput(self, index):
        self.memo[index] = self.stack[-1]

    do_long_binput = do_binput

    def do_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binget(self, index):
        self.stack.append(self.memo[index])

    do_long_binget = do_binget

    def do_empty_dict(self, _):
        self.stack.append({})

    def do_empty_list(self, _):
        self.stack.append([])

    def do_empty_tuple(self, _):
        self.stack.append(())

    def do_tuple(self, _):
        self.stack.append(tuple(self.marked()))

    def do_tuple1(self, _):
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def do_tuple2(self, _):
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def do_tuple3(self, _):
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def do_append(self, _):
        item = self.stack.pop()
        _expect(self.stack[-1], list).append(item)

    def do_appends(self, _):
        items = self.marked()
        _expect(self.stack[-1], list).extend(items)

    def do_setitem(self, _):
        value, name = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], name, value)

    def do_setitems(self, _):
        items = self.marked()
        for name, value in zip(items[::2], items[1::2], strict=True):
            _set(self.stack[-1], name, value)

    def do_global(self, argument):
        self.stack.append(_Global(argument.replace(" ", ".")))

    def do_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_Global(f"{module}.{name}"))

    def do_reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        name = _expect(function, _Global).name
        if name not in _REBUILDERS:
            raise _Refused(f"the pickle calls {name}, which no state dict needs; not read for safety")
        self.stack.append(_REBUILDERS[name](*_expect(arguments, tuple)))

    def do_build(self, _):
        # The only state in a state dict is OrderedDict's `_metadata`, module versions that are of no use here.
        self.stack.pop()
        _expect(self.stack[-1], dict)

    def do_binpersid(self, _):
        kind, storage, key, _device, _count = _expect(self.stack.pop(), tuple)
        name = _expect(storage, _Global).name
        if kind != "storage" or name not in _STORAGES:
            raise _Refused(f"the pickle names a storage of type {name}, which is not supported")
        self.stack.append(Storage(_expect(key, str), _STORAGES[name]))


def _expect(value, kind: type):
    if not isinstance(value, kind):
        found = value.name if isinstance(value, _Global) else type(value).__name__
        raise _Refused(f"the pickle has {found} where a {kind.__name__.strip('_')} belongs; no state dict")
    return value


def _set(target, name, value) -> None:
    if not isinstance(name, str | int):
        raise _Refused(f"the pickle has a {type(name).__name__} as a name; no state dict")
    _expect(target, dict)[name] = value


def _ordered(arguments: tuple) -> dict:
    result: dict = {}
    for name, value in _expect(arguments[0], list) if arguments else ():
        _set(result, name, value)
    return result


def _dtype(value) -> str:
    name = _expect(value, _Global).name.removeprefix("torch.")
    if name not in MINDSPORE.values():
        raise _Refused(f"the pickle has a tensor of dtype {name}, which is not supported")
    return name


def _tensor(storage, dtype, offset, shape, strides) -> PickledTensor:
    _expect(storage, Storage)
    if dtype is None:
        raise _Refused("the pickle has a tensor without dtype")
    for number in (offset, *_expect(shape, tuple), *_expect(strides, tuple)):
        if type(number) is not int or not 0 <= number < 2**63:
            raise _Refused(f"the pickle has a tensor with an impossible offset, size or stride: {number!r:.40}")
    if len(shape) != len(strides) or len(shape) > 32:
        raise _Refused("the pickle has a tensor whose sizes and strides disagree")
    return PickledTensor(storage, dtype, offset, shape, strides)
