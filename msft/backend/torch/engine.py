"""Builds the PyTorch engine."""

from msft.backend.contract import Engine, Runtime, Tuning
from msft.backend.engine import FrameworkEngine
from msft.backend.staged import StagedEngine
from msft.backend.torch import distributed
from msft.backend.torch.cached_state import StateSession
from msft.backend.torch.encoder_decoder import EncoderDecoderModel
from msft.backend.torch.encoder_generation import EncoderSession
from msft.backend.torch.generation import Session
from msft.backend.torch.model import Model
from msft.backend.torch.optimizer import AdamW
from msft.backend.torch.sharded import ShardedAdamW, ShardedEngine, ShardedModel
from msft.backend.torch.staged import StagedModel
from msft.models.spec import ModelSpec


def build(spec: ModelSpec, source, tuning: Tuning, runtime: Runtime) -> Engine:
    """Return an engine with the source's weights on the runtime's device."""
    is_sharded = distributed.mesh().shards(runtime.strategy)
    if is_sharded and runtime.strategy == "deepspeed":
        from msft.backend.torch.zero import ZeroEngine

        return ZeroEngine(spec, source, tuning, runtime)
    kinds = (ShardedModel, ShardedAdamW, ShardedEngine) if is_sharded else (Model, AdamW, FrameworkEngine)
    if distributed.mesh().pipeline > 1:
        kinds = (StagedModel, AdamW, StagedEngine)
    model_kind, optimizer_kind, engine_kind = kinds
    session = StateSession if spec.state_space else Session
    if spec.encoder:
        model_kind, session = EncoderDecoderModel, EncoderSession
    model = model_kind(spec, source, tuning, runtime)
    optimizer = optimizer_kind(model, runtime.optimizer, runtime.shard_optimizer)
    return engine_kind(model, optimizer, distributed, session, runtime)
