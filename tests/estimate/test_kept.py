"""Protects what an estimate says of the engines' own code: its constants, its tiles, what blocks keep."""

import numpy as np
import pytest

from msft.backend import context, line
from msft.backend.contract import Lora, Precision, Tuning
from msft.estimate import kept
from msft.estimate.layout import Layout
from msft.estimate.sizes import Work, sizes_of
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes
from tests.conftest import TINY

SPEC = spec_from_hf(TINY)


def work(backend="torch", rows=2, length=24, recompute=False, kind="cpu", compute="float32"):
    return Work(backend, kind, Precision(compute, compute), rows, length, recompute)


def full():
    return sizes_of(SPEC, Tuning(tuple(tensor_shapes(SPEC))))


def adapted():
    modules = tuple(name for name in linear_modules(SPEC) if ".self_attn." in name)
    return sizes_of(SPEC, Tuning(lora=Lora(4, 8.0, 0.0, modules)))


def test_the_engines_constants_are_those_of_the_estimate():
    from msft.backend.mindspore import attention as mindspore_attention
    from msft.backend.mindspore import ops as mindspore_ops
    from msft.backend.mindspore import state_space as mindspore_states
    from msft.backend.torch import attention as torch_attention
    from msft.backend.torch import ops as torch_ops
    from msft.backend.torch import state_space as torch_states
    from msft.estimate import state_kept

    assert kept.LOSS_CHUNK == {"torch": torch_ops.LOSS_CHUNK, "mindspore": mindspore_ops.LOSS_CHUNK}
    assert kept.TORCH_TILE == torch_attention.TILE
    assert state_kept.STRIP == torch_states.STRIP == mindspore_states.STRIP
    assert kept.KEPT == torch_attention.KEPT == mindspore_attention.KEPT


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 64), (3, 65), (2, 512), (1, 1000), (5, 130)])
def test_mindspores_tiles_are_those_of_its_line(rows, length):
    pieces = context.part(np.ones((rows, length), np.int32)).pieces
    tiles = {found.keys.shape[1]: len(found.keys) for found in line.tiles(pieces)}
    assert dict(kept.mindspore_tiles(work("mindspore", rows, length))) == tiles


@pytest.mark.parametrize(("rows", "length"), [(3, 40), (2, 300), (1, 700)])
def test_what_torchs_block_saves_is_what_autograd_holds(rows, length):
    """The bytes that a block's operators give to autograd, counted by torch itself."""
    import torch

    from msft.backend.contract import Batch, Runtime
    from msft.backend.torch.model import Model
    from msft.convert.random_weights import RandomWeights

    ids = np.random.default_rng(0).integers(1, SPEC.vocab_size, (rows, length), dtype=np.int32)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = Batch(ids, ids, places, np.ones_like(ids), np.zeros_like(ids))
    tuned = Tuning(tuple(tensor_shapes(SPEC)))
    modules = tuple(name for name in linear_modules(SPEC) if ".self_attn." in name)
    for tuning, sizes in ((tuned, full()), (Tuning(lora=Lora(4, 8.0, 0.0, modules)), adapted())):
        model = Model(SPEC, RandomWeights(SPEC, 0), tuning, Runtime())
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.decoder.network.parameters()}
        held = {}

        def hold(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor), model.decoder.mode(None, True):
            hidden = model._hidden(batch)
        found = sum(size for place, size in held.items() if place not in weights)
        blocks = SPEC.num_hidden_layers * kept.block(sizes, work(rows=rows, length=length), Layout())
        # Beside blocks: the last norm's input, rotary tables, norms' numbers a token, masks of tiles.
        assert found == pytest.approx(blocks, rel=0.12), tuning
        assert hidden.shape == (rows, length, SPEC.hidden_size)


def test_what_mindspores_block_keeps_is_what_its_trace_holds():
    import mindspore

    from msft.backend.contract import Batch, Runtime
    from msft.backend.mindspore.model import Model
    from msft.convert.random_weights import RandomWeights

    rows, length = 2, 96
    ids = np.random.default_rng(0).integers(1, SPEC.vocab_size, (rows, length), dtype=np.int32)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = Batch(ids, ids, places, np.ones_like(ids), np.zeros_like(ids))
    modules = tuple(name for name in linear_modules(SPEC) if ".self_attn." in name)
    for recompute in (False, True):
        tuning, runtime = Tuning(lora=Lora(4, 8.0, 0.0, modules)), Runtime(recompute=recompute)
        trace = Model(SPEC, RandomWeights(SPEC, 0), tuning, runtime)._forward(batch, keep=True)
        tensors = [one.hidden for one in trace.kept]
        for inner in (one.inner for one in trace.kept if one.inner):
            tensors += [inner.heads, inner.mixed, inner.middle, inner.wide, *inner.weights]
        found = sum(tensor.size * tensor.itemsize for tensor in tensors if isinstance(tensor, mindspore.Tensor))
        one = kept.block_input if recompute else kept.block
        assert found == SPEC.num_hidden_layers * one(adapted(), work("mindspore", rows, length), Layout())


def test_what_blocks_with_states_keep():
    """What autograd holds of them on torch, all weights tuned and adapters alone."""
    from msft.estimate import state_kept
    from tests.conformance import families

    batch = families.batch(rows=1, length=128)
    for name in ("mamba", "mamba2"):
        spec = families.spec_of(name)
        modules = tuple(linear_modules(spec))
        for tuning in (Tuning(tuple(tensor_shapes(spec))), Tuning(lora=Lora(4, 8.0, 0.0, modules))):
            sizes, tokens = sizes_of(spec, tuning), int((batch.segment_ids != 0).sum())
            expected = state_kept.block(sizes, work(), tokens, 4) * spec.num_hidden_layers
            assert saved_by_torch(spec, tuning, batch) == pytest.approx(expected, rel=0.1), (name, tuning)


def saved_by_torch(spec, tuning, batch):
    import torch

    from msft.backend.contract import Runtime
    from msft.backend.torch.model import Model
    from msft.convert.random_weights import RandomWeights

    model, held = Model(spec, RandomWeights(spec, 0), tuning, Runtime()), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.decoder.network.parameters()}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor), model.decoder.mode(None, True):
        hidden = model._hidden(batch)
    assert hidden.shape[-1] == spec.hidden_size
    return sum(size for place, size in held.items() if place not in weights)


def test_a_block_of_a_fused_attention_by_hand():
    # Hidden 32, 4 heads and 2 key-value heads of 8, feed-forward 48; hidden states of full tuning are float32.
    tokens = 2 * 24
    states = 4 * 32 * 4  # the input, two norms' results, the middle
    others = (32 + 2 * 16 + 32 + 3 * 48) * 2 + 4 * 4  # q, k, v, mixed, gate, up, gated; a number a head
    found = kept.block(full(), work(kind="cuda", compute="bfloat16"), Layout())
    assert found == tokens * (states + others)
    split = kept.block(full(), work(kind="cuda", compute="bfloat16"), Layout(tensor=2))
    assert split == tokens * (states + others / 2)
    layout = Layout(tensor=2, sequence_parallel=True)
    assert kept.block(full(), work(kind="cuda", compute="bfloat16"), layout) == found / 2
