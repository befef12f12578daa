"""Random numbers that are equal on both engines, because they are functions of names and counters.

A dropout bit depends on (seed, step, example, position) and on (module, feature) alone, never on the engine, the
number of ranks or the order of computation. Integers are 32 bits and wrap; the finaliser is Ellis's lowbias32.
"""

import hashlib
import math

import numpy as np

# The last mixing round, which the engines run themselves on int32 tensors: x = a ^ b; x *= MULTIPLIER;
# x ^= (x >> SHIFT) & SHIFT_MASK; x *= MULTIPLIER_2. SHIFT_MASK makes an arithmetic shift a logical one.
MULTIPLIER = 0x2C1B3C6D
SHIFT = 12
SHIFT_MASK = (1 << (32 - SHIFT)) - 1
MULTIPLIER_2 = 0x297A2D39


def _mix(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.uint32)
    values ^= values >> np.uint32(16)
    values *= np.uint32(0x7FEB352D)
    values ^= values >> np.uint32(15)
    values *= np.uint32(0x846CA68B)
    values ^= values >> np.uint32(16)
    return values


def _name_key(*parts) -> int:
    digest = hashlib.sha256("\x00".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:16], "little")


def token_keys(seed: int, step: int, row_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """Return one key per token for optimizer step `step`, int32 [rows, length].

    `row_ids` int32 [rows, length] number the examples of the step's global batch (`contract.Batch`), `position_ids`
    the tokens of an example: where an example stands, alone in a row or packed with others, plays no part.
    """
    start = np.uint32(_name_key("token", seed, step) & 0xFFFFFFFF)
    examples = _mix(row_ids.astype(np.uint32) ^ start)
    return _mix(examples ^ position_ids.astype(np.uint32)).view(np.int32)


def feature_keys(module: str, features: int) -> np.ndarray:
    """Return one key per input feature of a module, int32 [features]."""
    start = np.uint32(_name_key("feature", module) & 0xFFFFFFFF)
    return _mix(np.arange(features, dtype=np.uint32) ^ start).view(np.int32)


def keep_threshold(probability: float) -> int:
    """Return t such that a random int32 is >= t with probability 1 - `probability`."""
    return min(round(probability * 2**32), 2**32 - 1) - 2**31


def keep_mask(tokens: np.ndarray, features: np.ndarray, probability: float) -> np.ndarray:
    """Return the dropout mask as numpy computes it, bool [rows, length, features]: what both engines must equal."""
    with np.errstate(over="ignore"):
        bits = tokens[..., None] ^ features
        bits = bits * np.int32(MULTIPLIER)
        bits = bits ^ ((bits >> SHIFT) & np.int32(SHIFT_MASK))
        bits = bits * np.int32(MULTIPLIER_2)
    return bits >= keep_threshold(probability)


def lora_a(seed: int, module: str, rank: int, features: int) -> np.ndarray:
    """Draw LoRA's A, float32 [rank, features]: Kaiming uniform with a = sqrt(5), as PEFT draws it."""
    generator = np.random.Generator(np.random.Philox(key=_name_key("lora_A", seed, module)))
    bound = 1 / math.sqrt(features)
    return generator.uniform(-bound, bound, (rank, features)).astype(np.float32)
