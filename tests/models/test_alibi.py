"""Protects ALiBi's slopes: the paper's for powers of two, and those that transformers takes for other numbers."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from msft.models.alibi import slopes


def test_eight_heads_take_the_papers_slopes():
    assert slopes(8) == pytest.approx([2.0**-power for power in range(1, 9)])


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 12, 16, 40])
def test_slopes_are_transformers(heads):
    mask = torch.ones(1, 3, dtype=torch.long)
    theirs = build_alibi_tensor(mask, heads, torch.float32).view(heads, 3)
    assert slopes(heads) == pytest.approx(theirs[:, 1].tolist(), rel=1e-6)
