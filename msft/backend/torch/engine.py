"""Builds the PyTorch engine."""

from msft.backend.contract import Engine, Runtime, Tuning
from msft.backend.engine import FrameworkEngine
from msft.backend.torch import distributed
from msft.backend.torch.generation import Session
from msft.backend.torch.model import Model
from msft.backend.torch.optimizer import AdamW
from msft.models.spec import ModelSpec


def build(spec: ModelSpec, source, tuning: Tuning, runtime: Runtime) -> Engine:
    """Return an engine with the source's weights on the runtime's device."""
    model = Model(spec, source, tuning, runtime)
    optimizer = AdamW(model, runtime.optimizer, runtime.shard_optimizer)
    return FrameworkEngine(model, optimizer, distributed, Session, runtime)
