"""As much of the protobuf wire format as MindSpore's CKPT and strategy files need.

Format: https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from msft.errors import InputError

VARINT, BYTES = 0, 2


def varint(number: int) -> bytes:
    """Return a number of 0 or more as a base-128 varint."""
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    result.append(number)
    return bytes(result)


def key(field: int, wire_type: int) -> bytes:
    """Return the key that stands before a field."""
    return varint(field << 3 | wire_type)


class Message:
    """A message that lies between two offsets of a file; everything in it must fit there.

    `what` the file should be is named when it is damaged.
    """

    def __init__(self, path: Path, file: BinaryIO, start: int, end: int, what: str = "MindSpore CKPT"):
        self.path, self.file, self.start, self.end, self.what = path, file, start, end, what

    def inside(self, start: int, end: int) -> "Message":
        """Return the message that is a field's content between two offsets."""
        return Message(self.path, self.file, start, end, self.what)

    def fields(self, varints: tuple[int, ...] = ()) -> Iterator[tuple[int, int, int]]:
        """Yield (field number, offset, end) of each field's content; only fields named in `varints` may be varints.

        Raises InputError when a field does not fit into the message.
        """
        position = self.start
        while position < self.end:
            tag, position = self.varint(position)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == BYTES:
                length, position = self.varint(position)
                stop = position + length
            elif wire_type == VARINT and number in varints:
                _, stop = self.varint(position)
            else:
                raise self.damaged(position)
            if stop > self.end:
                raise self.damaged(position)
            yield number, position, stop
            position = stop

    def varint(self, position: int) -> tuple[int, int]:
        """Return the varint at an offset and the offset after it."""
        self.file.seek(position)
        number = 0
        for index in range(min(10, self.end - position)):
            byte = self.file.read(1)
            if not byte:
                break
            number |= (byte[0] & 127) << 7 * index
            if byte[0] < 128:
                return number, position + index + 1
        raise self.damaged(position)

    def varints(self, position: int, stop: int) -> list[int]:
        """Return the varints between two offsets: one for a plain field, several for a packed one."""
        numbers = []
        while position < stop:
            number, position = self.varint(position)
            numbers.append(number)
            if len(numbers) > 32:
                raise self.damaged(position)
        return numbers

    def text(self, position: int, stop: int, limit: int) -> str:
        """Return the UTF-8 text between two offsets; raises InputError above `limit` bytes."""
        self.file.seek(position)
        if stop - position > limit:
            raise self.damaged(position)
        try:
            return self.file.read(stop - position).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(position) from None

    def damaged(self, position: int) -> InputError:
        """Return the error that says where the file is not what it should be."""
        return InputError(f"{self.path}: no {self.what}, or truncated or damaged (byte {position})")
