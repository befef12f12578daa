"""How a device is chosen, the same rule for both engines."""

from collections.abc import Callable, Sequence

from msft.errors import InputError, did_you_mean


def choose(asked: str, kinds: Sequence[str], present: Callable[[str], bool], framework: str) -> tuple[str, str]:
    """Return the device to run on and why; 'auto' takes the first of `kinds` (best first) that is present.

    `framework` is its name and version, for messages. Raises InputError when the one asked for is unknown or absent.
    """
    if asked == "auto":
        return next(kind for kind in kinds if present(kind)), f"the best device that {framework} sees here"
    if asked not in kinds:
        near = did_you_mean(asked, kinds)
        raise InputError(f"device: {asked!r} is unknown to {framework}{near} (auto, {', '.join(kinds)})")
    if not present(asked):
        raise InputError(f"device: '{asked}' was asked for, but {framework} sees none here")
    return asked, "asked for"
