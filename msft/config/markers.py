"""What the schema says about a key besides its type: without meaning here, refused, or for one engine only."""

from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from msft.errors import did_you_mean


class Unused(NamedTuple):
    """A key that is accepted, does nothing here, and is reported with the reason."""

    why: str


class Refused(NamedTuple):
    """A key whose values, except the neutral ones, would change the result in a way that is not built."""

    why: str
    neutral: tuple[Any, ...]


class OnlyOn(NamedTuple):
    """A key that means something on one backend only; on the other it is reported."""

    backend: str
    why: str


class Alias(NamedTuple):
    """A key that repeats another block, which is the one that is read."""

    path: str


DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def shown(value: Any) -> str:
    """Return a value as it may stand in a message: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or isinstance(value, float) and value != value // 1:
        raise ValueError(f"must be a whole number, not {value}")
    return value


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}
    if str(value).lower() in words and not isinstance(value, float):
        return words[str(value).lower()]
    raise ValueError(f"must be True or False, not {shown(value)}{did_you_mean(str(value).title(), ('True', 'False'))}")


def _dtype(value: Any) -> Any:
    if isinstance(value, str) and value.lower() in DTYPES | _SHORT_DTYPES:
        return _SHORT_DTYPES.get(value.lower(), value.lower())
    raise ValueError(f"must be float32, bfloat16 or float16, not {shown(value)}{did_you_mean(str(value), DTYPES)}")


def _text_list(value: Any) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"must be text or a list of texts, not {shown(value)}")
    return [item for item in items if item]


def _interval(value: Any) -> Any:
    if _whole(value) == 0:
        raise ValueError("must be a number of steps or epochs above 0, or -1 for never, not 0")
    return value


# What is larger cannot be read back from the recipe that a run writes.
LARGEST = 2**63 - 1
Whole = Annotated[int, BeforeValidator(_whole), Field(le=LARGEST)]
Positive = Annotated[Whole, Field(gt=0)]
Count = Annotated[Whole, Field(ge=0)]
CountOrAll = Annotated[Whole, Field(ge=-1)]
Interval = Annotated[int, Field(ge=-1, le=LARGEST), BeforeValidator(_interval)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Switch = Annotated[bool, BeforeValidator(_switch)]
Dtype = Annotated[str, BeforeValidator(_dtype)]
Texts = Annotated[list[str], BeforeValidator(_text_list)]
