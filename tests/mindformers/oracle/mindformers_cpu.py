"""Starts the real MindFormers 1.3.2 on a CPU: what every program in this folder does first.

These programs run in MindFormers' own environment, as processes of their own; they import nothing of msft.
"""

import os

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
from mindspore.nn.wrap.loss_scale import TrainOneStepWithLossScaleCell
from mindspore.ops import operations as P


def load_recipe(path: str):
    """Read a YAML file with MindFormers' own reader and set up MindSpore as `run_mindformer.py` does."""
    from mindformers.core.context import build_context
    from mindformers.modules.layers import RotaryEmbedding
    from mindformers.tools.register import MindFormerConfig
    from mindformers.tools.utils import set_output_path

    _shim(RotaryEmbedding)
    config = MindFormerConfig(path)
    set_output_path(config.output_dir)
    build_context(config)
    return config


def _shim(rotary_embedding) -> None:
    """Replace the two things that exist on Ascend only: the overflow kernels and a cast."""
    no_overflow = ms.Tensor(False)
    TrainOneStepWithLossScaleCell.get_overflow_status = lambda self, status, compute_output: no_overflow
    original = rotary_embedding.__init__

    def with_cast(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.cast = P.Cast()

    rotary_embedding.__init__ = with_cast
