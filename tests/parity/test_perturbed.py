"""One ulp: the next number of the tensor's own dtype, in one element, and nothing else."""

import ml_dtypes
import numpy as np
import pytest

from msft.convert.random_weights import RandomWeights
from msft.models.families import spec_from_hf
from msft.parity.perturbed import PerturbedWeights
from tests.conftest import TINY


class Narrow(RandomWeights):
    """Random weights of a narrower dtype."""

    def __init__(self, spec, dtype):
        super().__init__(spec, 0)
        self.dtype = dtype

    def read(self, name):
        return super().read(name).astype(self.dtype)


@pytest.mark.parametrize("dtype,kind", [(np.float32, "i4"), (np.float16, "i2"), (ml_dtypes.bfloat16, "i2")])
def test_one_element_moves_by_one_ulp(dtype, kind):
    spec = spec_from_hf(TINY)
    base = Narrow(spec, dtype)
    moved = PerturbedWeights(base, spec)
    changed = {name for name in base.tensors if not np.array_equal(moved.read(name), base.read(name))}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}
    before, after = (source.read(*changed).view(kind).astype(np.int64).ravel() for source in (base, moved))
    assert abs(after[0] - before[0]) == 1 and np.array_equal(after[1:], before[1:])
