"""Rotary embedding frequencies and their scaling kinds, in numpy, once for both engines.

Kinds and keys are transformers' `rope_parameters`: default (RoFormer, arXiv:2104.09864), linear (position
interpolation, arXiv:2306.15595), dynamic (NTK-aware), llama3, yarn (arXiv:2309.00071), longrope
(arXiv:2402.13753, Phi-3). half_precision is ChatGLM-6B's:
its release rounds the frequencies to float16.
"""

import math
from dataclasses import replace

import numpy as np

from msft.errors import InputError, did_you_mean
from msft.models.spec import ModelSpec


def frequencies(spec: ModelSpec, length: int) -> tuple[np.ndarray, float]:
    """Return the inverse frequencies, float32 [rotary_dim / 2], and the factor on cosine and sine.

    `length` is the longest sequence of the batch: only the dynamic kind and longrope depend on it.
    Raises InputError as `check` does.
    """
    check(spec)
    scaling = spec.rope_scaling or {"rope_type": "default"}
    try:
        inverse, factor = KINDS[scaling["rope_type"]](spec, scaling, length)
    except (ArithmeticError, ValueError) as error:
        raise InputError(f"rope_scaling: {scaling!r:.200} gives no frequencies ({error})") from None
    if not (np.isfinite(inverse).all() and math.isfinite(factor)):
        raise InputError(f"rope_scaling: {scaling!r:.200} gives frequencies that are no finite numbers")
    return inverse, factor


def check(spec: ModelSpec) -> None:
    """Raise InputError when the scaling's kind is unknown or lacks a number that it needs."""
    scaling = spec.rope_scaling or {"rope_type": "default"}
    kind = scaling["rope_type"]
    if kind not in KINDS:
        raise InputError(f"rope_type: {kind!r:.80} is unknown{did_you_mean(kind, KINDS)} (known: {', '.join(KINDS)})")
    problems = _wrong_factors(spec, scaling) if kind == "longrope" else []
    problems += [
        f"rope_scaling: {kind} needs {key!r} to be a number above 0, not {scaling.get(key)!r:.80}"
        for key in NEEDED.get(kind, ("factor",))
        if not (is_number(scaling.get(key)) and scaling[key] > 0)
    ]
    problems += [
        f"rope_scaling: {key!r} must be a number of 0 or more, not {scaling[key]!r:.80}"
        for key in OPTIONAL
        if not (scaling.get(key) is None or is_number(scaling[key])) and key not in NEEDED.get(kind, ("factor",))
    ]
    if problems:
        raise InputError(*problems)


def border(spec: ModelSpec) -> int | None:
    """Return the length of the texts beyond which all positions are turned in another way (None: there is none)."""
    scaling = spec.rope_scaling or {}
    is_long = scaling.get("rope_type") == "longrope"
    return scaling.get("original_max_position_embeddings") or spec.max_position_embeddings if is_long else None


def _wrong_factors(spec: ModelSpec, scaling: dict) -> list[str]:
    """What longrope needs beside numbers: two factors for each frequency."""
    count = spec.rotary_dim // 2
    return [
        f"rope_scaling: longrope needs {key!r} to be a list of {count} numbers above 0, not {scaling.get(key)!r:.80}"
        for key in ("short_factor", "long_factor")
        if not (
            isinstance(scaling.get(key), list)
            and len(scaling[key]) == count
            and all(is_number(factor) and factor > 0 for factor in scaling[key])
        )
    ]


def is_number(value) -> bool:
    """Whether a value is a number of 0 or more that a float32 holds."""
    return type(value) in (int, float) and 0 <= value < 2**127


def tables(spec: ModelSpec, position_ids: np.ndarray, longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine, float32 [rows, length, head_dim], for position ids int32 [rows, length].

    Both features of a pair have the same angle: those of the two halves of what is turned, or neighbours. What is not
    turned has a cosine of 1 and a sine of 0. `longest` is the length of the text that they are of, where not its last
    position is among them. Where a model has a `prefix`, `position_ids` may be [2, rows, length], for a half of a head
    each.
    """
    if spec.prefix:
        return _halves(spec, position_ids, longest)
    still = ((0, 0),) * position_ids.ndim + ((0, spec.head_dim - spec.rotary_dim),)
    if not spec.rotary_dim:
        return np.ones((*position_ids.shape, spec.head_dim), np.float32), np.zeros(
            (*position_ids.shape, spec.head_dim), np.float32
        )
    inverse, factor = frequencies(spec, longest or int(position_ids.max()) + 1)
    angles = position_ids.astype(np.float32)[..., None] * inverse
    angles = np.repeat(angles, 2, axis=-1) if spec.neighbours else np.concatenate([angles, angles], axis=-1)
    cosine, sine = np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)
    return np.pad(cosine, still, constant_values=1), np.pad(sine, still)


def tables_by_row(spec: ModelSpec, position_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `tables`, those of each row by its own length where this decides how it is turned (`border`)."""
    if border(spec) is None:
        return tables(spec, position_ids)
    of_rows = [tables(spec, row[None]) for row in position_ids]
    return tuple(np.concatenate(each) for each in zip(*of_rows, strict=True))


def _halves(spec: ModelSpec, position_ids: np.ndarray, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    if position_ids.ndim == 2:
        position_ids = np.stack((position_ids, position_ids))
    half = replace(spec, prefix=None, head_dim=spec.rotary_dim)
    longest = longest or int(position_ids.max()) + 1
    first, second = (tables(half, ids, longest) for ids in position_ids)
    return tuple(np.concatenate(both, axis=-1) for both in zip(first, second, strict=True))


def pairs(spec: ModelSpec) -> list[tuple[int, int]]:
    """Return the features of a head that are turned together."""
    half = spec.rotary_dim // 2
    found = [(2 * pair, 2 * pair + 1) if spec.neighbours else (pair, pair + half) for pair in range(half)]
    again = [(first + spec.rotary_dim, second + spec.rotary_dim) for first, second in found]
    return found + again if spec.prefix else found


def signs(spec: ModelSpec) -> np.ndarray:
    """Return -1 for the features of a head that are the first of a pair, else 1, float32 [head_dim]."""
    found = np.ones(spec.head_dim, np.float32)
    found[[first for first, _ in pairs(spec)]] = -1
    return found


def _inverse(base: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.power(np.float32(base), exponents)


def _default(spec: ModelSpec, scaling: dict, length: int) -> tuple[np.ndarray, float]:
    return _inverse(spec.rope_theta, spec.rotary_dim), 1.0


def _half_precision(spec: ModelSpec, scaling: dict, length: int) -> tuple[np.ndarray, float]:
    return _inverse(spec.rope_theta, spec.rotary_dim).astype(np.float16).astype(np.float32), 1.0


def _linear(spec: ModelSpec, scaling: dict, length: int) -> tuple[np.ndarray, float]:
    return _inverse(spec.rope_theta, spec.rotary_dim) / np.float32(scaling["factor"]), 1.0


def _dynamic(spec: ModelSpec, scaling: dict, length: int) -> tuple[np.ndarray, float]:
    dim, factor = spec.rotary_dim, scaling["factor"]
    stretch = max(length, spec.max_position_embeddings) / spec.max_position_embeddings
    return _inverse(spec.rope_theta * (factor * stretch - (factor - 1)) ** (dim / (dim - 2)), dim), 1.0


def _llama3(spec: ModelSpec, scaling: dict, length: int) -> tuple[np.ndarray, float]:
    inverse = _inverse(spec.rope_theta, spec.rotary_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    # Fast frequencies stay, slow ones are divided, those between are blended.
    keep = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (keep * inverse + (1 - keep) * inverse / np.float32(scaling["factor"])).astype(np.float32), 1.0


def _yarn(spec: ModelSpec, scaling: dict, length: int) -> tuple[np.ndarray, float]:
    dim, base = spec.rotary_dim, spec.rope_theta
    original = scaling.get("original_max_position_embeddings") or spec.max_position_embeddings
    factor = scaling["factor"]

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    steps = (np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    interpolate = np.clip(steps, 0, 1).astype(np.float32)
    inverse = _inverse(base, dim)
    blended = inverse / np.float32(factor) * interpolate + inverse * (1 - interpolate)
    return blended.astype(np.float32), _yarn_factor(scaling, factor)


def _yarn_factor(scaling: dict, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1)


def _longrope(spec: ModelSpec, scaling: dict, length: int) -> tuple[np.ndarray, float]:
    original = border(spec)
    stretch = scaling.get("factor") or spec.max_position_embeddings / original
    factor = scaling.get("attention_factor")
    if factor is None:
        factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    factors = np.array(scaling["long_factor" if length > original else "short_factor"], np.float32)
    return _inverse(spec.rope_theta, spec.rotary_dim) / factors, factor


# The numbers that a kind cannot do without, where these are more or fewer than `factor`.
NEEDED = {
    "default": (),
    "half_precision": (),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# The numbers that some kinds take when they are given.
OPTIONAL = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
KINDS = {
    "default": _default,
    "half_precision": _half_precision,
    "linear": _linear,
    "longrope": _longrope,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
