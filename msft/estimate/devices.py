"""Devices by their published numbers, and the one efficiency factor of each.

A step's time is (products / peak + bytes moved / bandwidth) / efficiency + communication: the efficiency is the share
of its data sheet that a device reaches in training. Each is the one number that fits published throughputs best (the
geometric mean of published over computed speed with efficiency 1), whatever the model, layout or kind of tuning;
tests/estimate/published.py holds the figures and where they come from, and tells the error of each:

- ascend910b: MindFormers' Llama 2 fine-tuning on Atlas 800T A2, full and LoRA, 7B to 70B;
- a100, h100: LLM Foundry's training benchmarks of MPT 1B to 70B, 8 to 64 devices, bf16;
- cpu: the best steps of this project's engines on SmolLM2-135M (benchmarks/NOTES.md), against products and copies that
  are measured when asked: 0.93 for torch, 0.68 for MindSpore.

Bandwidths are per device and direction: `link` within a machine of 8, `network` between machines.
"""

import os
import time
from typing import NamedTuple

import numpy as np

from msft.errors import InputError, did_you_mean

GIGA, TERA = 1e9, 1e12
# The share of a device's memory that tensors may take; drivers and fragments take the rest (MindFormers' recipes for
# 64 GB devices set max_device_memory to 54 to 59 GB).
USABLE = 0.9
PRODUCT, COPY = 1024, 1 << 26


class Device(NamedTuple):
    """A device: `kind` is cpu, cuda or npu; `memory` bytes; `peak` FLOP/s by compute dtype; the others bytes/s."""

    name: str
    kind: str
    memory: float
    peak: dict[str, float]
    bandwidth: float
    link: float
    network: float
    efficiency: float
    source: str

    @property
    def usable(self) -> float:
        """Bytes that a run may take."""
        return USABLE * self.memory


def _half(rate: float, single: float) -> dict[str, float]:
    return {"float16": rate * TERA, "bfloat16": rate * TERA, "float32": single * TERA}


DEVICES = {
    "ascend910b": Device(
        "ascend910b", "npu", 64 * GIGA, _half(313, 75), 1600 * GIGA, 196 * GIGA, 25 * GIGA, 0.65,
        "Atlas 800T A2: 313 TFLOP/s in 16 bits, 64 GB at 1.6 TB/s, HCCS 392 GB/s both ways, RoCE 200 Gbit/s",
    ),
    "a100": Device(
        "a100", "cuda", 80 * GIGA, _half(312, 19.5), 2039 * GIGA, 300 * GIGA, 25 * GIGA, 0.72,
        "A100 SXM 80 GB: 312 TFLOP/s in 16 bits, 2039 GB/s, NVLink 600 GB/s both ways, InfiniBand 200 Gbit/s",
    ),
    "h100": Device(
        "h100", "cuda", 80 * GIGA, _half(989, 67), 3350 * GIGA, 450 * GIGA, 50 * GIGA, 0.60,
        "H100 SXM: 989 TFLOP/s in 16 bits, 3350 GB/s, NVLink 900 GB/s both ways, InfiniBand 400 Gbit/s",
    ),
}  # fmt: skip
CPU_EFFICIENCY = 0.80
NAMES = (*DEVICES, "cpu")


def device_named(name: str) -> Device:
    """Return a device by its name; `cpu` is this machine, measured in a quarter of a second.

    Raises InputError naming the nearest known one.
    """
    if name == "cpu":
        return this_machine()
    if name not in DEVICES:
        known = ", ".join(NAMES)
        raise InputError(f"--device: unknown device {name!r:.80}{did_you_mean(name, NAMES)} (known: {known})")
    return DEVICES[name]


def this_machine() -> Device:
    """Return this machine's CPUs as one device: its memory, the best float32 product and copy of a few in numpy.

    bfloat16 and float16 count as float32, since few CPUs are faster with them.
    """
    square = np.ones((PRODUCT, PRODUCT), np.float32)
    rate = 2 * PRODUCT**3 / _least_seconds(lambda: square @ square)
    source, target = np.ones(COPY // 4, np.float32), np.empty(COPY // 4, np.float32)
    bandwidth = 2 * COPY / _least_seconds(lambda: np.copyto(target, source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = (
        f"this machine, measured with numpy: {rate / GIGA:.0f} GFLOP/s in float32, {bandwidth / GIGA:.0f} GB/s, "
        f"{memory / GIGA:.1f} GB"
    )
    peak = dict.fromkeys(("float32", "float16", "bfloat16"), rate)
    # Processes on one machine meet in its memory.
    return Device("cpu", "cpu", memory, peak, bandwidth, bandwidth, bandwidth, CPU_EFFICIENCY, said)


def _least_seconds(work) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
