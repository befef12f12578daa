"""Builds the MindSpore engine."""

import mindspore

from msft.backend.contract import Engine, Runtime, Tuning
from msft.backend.engine import FrameworkEngine
from msft.backend.mindspore import distributed, whole_engine
from msft.backend.mindspore.cached_state import StateSession
from msft.backend.mindspore.device import TARGETS
from msft.backend.mindspore.encoder_decoder import EncoderDecoderModel
from msft.backend.mindspore.encoder_generation import EncoderSession
from msft.backend.mindspore.generation import Session
from msft.backend.mindspore.model import Model
from msft.backend.mindspore.optimizer import AdamW
from msft.backend.mindspore.staged import StagedModel
from msft.backend.staged import StagedEngine
from msft.models.spec import ModelSpec


def build(spec: ModelSpec, source, tuning: Tuning, runtime: Runtime) -> Engine:
    """Return an engine with the source's weights on the runtime's device."""
    target = TARGETS[runtime.device]
    # It can be set once only, before anything is computed: distributed.initialize has done so, or the caller.
    if mindspore.get_context("device_target") != target:
        mindspore.set_device(target)
    if runtime.plan is not None:
        return whole_engine.build(spec, source, tuning, runtime)
    # Blocks are compiled one by one; what joins them runs as it is written.
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    is_staged = distributed.mesh().pipeline > 1
    model_kind, engine_kind = (StagedModel, StagedEngine) if is_staged else (Model, FrameworkEngine)
    session = StateSession if spec.state_space else Session
    if spec.encoder:
        model_kind, session = EncoderDecoderModel, EncoderSession
    model = model_kind(spec, source, tuning, runtime)
    optimizer = AdamW(model, runtime.optimizer, runtime.shard_optimizer)
    return engine_kind(model, optimizer, distributed, session, runtime)
