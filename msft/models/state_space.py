"""What layers with states in place of attention are: Mamba's (arXiv 2312.00752) and Mamba2's (arXiv 2405.21060)."""

import math
from dataclasses import dataclass

import numpy as np

INPUT, SELECT, STEP, OUTPUT = "mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"
CONVOLUTION, GATED_NORM = "mixer.conv1d", "mixer.norm"
# Why a module that looks as if it could have an adapter has none.
WITHOUT_ADAPTERS = {
    "out_proj": "PEFT refuses adapters on the out_proj of Mamba models, whose kernels read its weight past them",
    "conv1d": "PEFT refuses adapters on the conv1d of Mamba models, whose kernels read its weight past them",
    "dt_proj": "transformers reads dt_proj's weight past an adapter, which would do nothing there",
}


@dataclass(frozen=True)
class StateSpace:
    """A layer's sizes under config.json's names.

    Mamba has a state of `state_size` numbers for each of `intermediate_size` channels, and decays of their own for all;
    `num_heads` is 0. Mamba2 has one decay for each head of `head_dim` channels, and `n_groups` of heads that share what
    they read and write; `time_step_rank` is 0. Time steps are kept within `time_step_limit`. With `residual_in_fp32`
    hidden states between layers are float32 whatever is computed in. `time_step_range` (least, largest, floor) and
    `time_step_scale` are for fresh weights.
    """

    state_size: int
    conv_kernel: int
    intermediate_size: int
    time_step_rank: int = 0
    num_heads: int = 0
    head_dim: int = 0
    n_groups: int = 0
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    residual_in_fp32: bool = True
    use_conv_bias: bool = True
    time_step_range: tuple[float, float, float] = (0.001, 0.1, 1e-4)
    time_step_scale: float = 1.0

    @property
    def convolved(self) -> int:
        """Channels that the convolution runs over."""
        return self.intermediate_size + 2 * self.n_groups * self.state_size

    @property
    def projected(self) -> int:
        """What the first module gives for a token: the gate, the convolution's channels, Mamba2's time steps."""
        return self.intermediate_size + self.convolved + self.num_heads

    @property
    def packed(self) -> int:
        """What the scan takes for a token: its input, what it writes and reads the state by, and time steps."""
        wide = self.convolved + self.num_heads
        return wide if self.num_heads else wide + self.intermediate_size + 2 * self.state_size

    @property
    def scanned(self) -> tuple[str, ...]:
        """The names, within a layer, of the tensors that the scan takes: decays, biases of time steps, what passes."""
        return "mixer.A_log", "mixer.dt_bias" if self.num_heads else f"{STEP}.bias", "mixer.D"

    def module_sizes(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of a layer's linear modules."""
        inner = self.intermediate_size
        between = {}
        if not self.num_heads:
            between = {SELECT: (self.time_step_rank + 2 * self.state_size, inner), STEP: (inner, self.time_step_rank)}
        return {INPUT: (self.projected, hidden), **between, OUTPUT: (hidden, inner)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a layer that are of no linear module and no norm over hidden states."""
        inner, heads = self.intermediate_size, self.num_heads
        decays, steps, passed = self.scanned
        found = {f"{CONVOLUTION}.weight": (self.convolved, 1, self.conv_kernel)}
        if self.use_conv_bias:
            found[f"{CONVOLUTION}.bias"] = (self.convolved,)
        if not heads:
            return {**found, steps: (inner,), decays: (inner, self.state_size), passed: (inner,)}
        return {**found, steps: (heads,), decays: (heads,), passed: (heads,), f"{GATED_NORM}.weight": (inner,)}

    def first_values(self, name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray | None:
        """Return a tensor's values before training, float32, as transformers draws them; None: like any model's."""
        decays, steps, passed = self.scanned
        if name.endswith(decays):
            return np.broadcast_to(np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)), shape).copy()
        if name.endswith(passed):
            return np.ones(shape, np.float32)
        if name.endswith(steps):
            least, largest, floor = self.time_step_range
            span = math.log(largest) - math.log(least)
            step = np.maximum(np.exp(generator.random(shape) * span + math.log(least)), floor)
            return (step + np.log(-np.expm1(-step))).astype(np.float32)
        bounds = {
            f"{CONVOLUTION}.weight": self.conv_kernel**-0.5,
            f"{OUTPUT}.weight": self.intermediate_size**-0.5,
            f"{STEP}.weight": max(self.time_step_rank, 1) ** -0.5 * self.time_step_scale,
        }
        for ending, bound in bounds.items():
            if name.endswith(ending):
                return generator.uniform(-bound, bound, shape).astype(np.float32)
        return None
