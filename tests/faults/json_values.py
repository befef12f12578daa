"""JSON of any shape, and real documents with pieces changed."""

import copy
import json

from hypothesis import strategies as st

HUGE = [2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**40, -1, -(2**63), 1e308, -0.0, 1e-320]
ODD_TEXTS = [
    "",
    "\0",
    "\ud800",
    "\u2028",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "{{ 1 }}",
    "é" * 300,
    "NaN",
    "1e999",
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70),
    st.sampled_from(HUGE),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed(draw, document, most: int = 3):
    """A copy of `document` (any JSON) with 1 to `most` places set to any value, removed, repeated or renamed."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        document = _change(draw, document)
    return document


def _change(draw, document):
    places = list(_places(document))
    if not places:
        return draw(values)
    place, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "swap", "wrap"]))
    if kind == "remove":
        del place[key]
    elif kind == "rename" and isinstance(place, dict):
        place[draw(st.text(max_size=6))] = place.pop(key)
    elif kind == "swap":
        other, name = draw(st.sampled_from(places))
        place[key] = copy.deepcopy(other[name])
    elif kind == "wrap":
        place[key] = draw(st.sampled_from([[place[key]], {"content": place[key]}, str(place[key])]))
    else:
        place[key] = draw(values)
    return document


def _places(value):
    """Every (container, key) of a document, outer ones first."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def written(value) -> bytes:
    """JSON as bytes, half surrogate pairs included as they would stand in a careless file."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw, content: bytes):
    """`content` cut, with bytes changed, taken out or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "remove", "number"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "number":
            data[at : at + 8] = draw(st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1])).to_bytes(8, "little")
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=12))
    return bytes(data)
