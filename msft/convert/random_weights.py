"""Fresh weights for training from scratch, equal on every engine and machine."""

import hashlib

import numpy as np

from msft.convert.source import TensorInfo
from msft.models import encoder_shapes
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec


class RandomWeights:
    """A TensorSource of float32 tensors drawn from (seed, name) alone.

    Matrices are normal(0, `initializer_range`), norms are ones (with what is added to them), biases zeros, as
    transformers initialises them.
    """

    def __init__(self, spec: ModelSpec, seed: int):
        shapes = tensor_shapes(spec)
        self.tensors = {name: TensorInfo(shape, "float32") for name, shape in shapes.items()}
        self.deviation = np.float32(spec.initializer_range)
        self.deviations = encoder_shapes.deviations(spec) if spec.encoder else {}
        self.seed, self.norm = seed, np.float32(1 - spec.norm_offset)
        self.state_space = spec.state_space

    def read(self, name: str) -> np.ndarray:
        """Draw one tensor, float32."""
        shape = self.tensors[name].shape
        own = self.state_space and self.state_space.first_values(name, shape, generator(self.seed, name))
        if own is not None:
            return own
        if name.endswith(".bias"):
            return np.zeros(shape, np.float32)
        if len(shape) == 1:
            return np.full(shape, self.norm)
        values = generator(self.seed, name).standard_normal(shape, np.float32)
        values *= np.float32(self.deviations.get(name, self.deviation))
        return values

    def file_of(self, name: str) -> str:
        """Return where a tensor comes from, for messages."""
        return f"random weights (seed {self.seed})"


def generator(seed: int, name: str) -> np.random.Generator:
    """Return a counter-based (Philox) generator of its own for each seed and name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
