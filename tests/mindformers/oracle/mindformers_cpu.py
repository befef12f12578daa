"""Starts the real MindFormers 1.3.2 on a CPU: what every program in this folder does first.

These programs run in MindFormers' own environment, as processes of their own; they import nothing of msft.
"""

import os

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
from mindspore import nn
from mindspore.nn.wrap.loss_scale import TrainOneStepWithLossScaleCell
from mindspore.ops import auto_generate
from mindspore.ops import operations as P


def load_recipe(path: str):
    """Read a YAML file with MindFormers' own reader and set up MindSpore as `run_mindformer.py` does."""
    replace_ascend_kernels()

    from mindformers.core.context import build_context
    from mindformers.tools.register import MindFormerConfig
    from mindformers.tools.utils import set_output_path

    config = MindFormerConfig(path)
    set_output_path(config.output_dir)
    build_context(config)
    return config


def replace_ascend_kernels() -> None:
    """Replace what exists on Ascend only: the overflow kernels, a cast and an operator that splits a tensor."""
    no_overflow = ms.Tensor(False)
    TrainOneStepWithLossScaleCell.get_overflow_status = lambda self, status, compute_output: no_overflow
    auto_generate.SplitWithSize = SplitLastAxis

    from mindformers.modules.layers import RotaryEmbedding

    original = RotaryEmbedding.__init__

    def with_cast(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.cast = P.Cast()

    RotaryEmbedding.__init__ = with_cast


class SplitLastAxis(nn.Cell):
    """`ops.SplitWithSize` for the last axis, from slices."""

    def construct(self, tensor, sizes, axis):
        start = 0
        parts = ()
        for size in sizes:
            parts += (tensor[..., start : start + size],)
            start += size
        return parts

    def add_prim_attr(self, name, value):
        return self

    def shard(self, strategy):
        return self
