"""Protects encoder-decoders on both engines beyond what every family has: long rows, hidden states, recomputation."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from msft.backend.contract import IGNORE, Batch, Tuning
from msft.errors import RunError
from msft.models.shapes import tensor_shapes
from tests.conformance import families
from tests.conformance.tiny_engines import ENGINES, Perturbed

# Sources and targets by row: more keys than are kept, tiles that end within a segment, segments of one token.
LONG = (((560, 80),), ((30, 10), (1, 70), (90, 1)))
SHORT = (((9, 4), (5, 7)), ((12, 8), (3, 0)))
BOTH = [pytest.param(engine, marks=[] if engine == "torch" else pytest.mark.families) for engine in ENGINES]


def rows_of(sizes):
    """A batch of rows of examples, (tokens of the source, of the target) each."""
    generator, width = np.random.default_rng(1), max(sum(map(sum, row)) for row in sizes)
    arrays = {name: np.zeros((len(sizes), width), np.int32) for name in ("input_ids", "position_ids", "segment_ids")}
    arrays |= {
        "labels": np.full((len(sizes), width), IGNORE, np.int32),
        "row_ids": np.zeros((len(sizes), width), np.int32),
    }
    for row, examples in enumerate(sizes):
        start = 0
        for number, (source, target) in enumerate(examples):
            place = np.s_[row, start : start + source + target]
            arrays["input_ids"][place] = generator.integers(1, families.VOCABULARY, source + target)
            arrays["position_ids"][place] = np.arange(source + target)
            arrays["segment_ids"][place], arrays["row_ids"][place] = number + 1, 3 * row + number
            start += source + target
            arrays["labels"][row, start - target : start] = generator.integers(1, families.VOCABULARY, target)
    return Batch(**arrays)


def examples_of(batch, sizes):
    """(row, where the source begins, where the target does, where it ends) of each example with a target."""
    for row, examples in enumerate(sizes):
        start = 0
        for source, target in examples:
            if target:
                yield row, start, start + source, start + source + target
            start += source + target


def build(engine, name, **changes):
    """An engine whose every tensor is tuned, of a model of one layer each where the name's is longer."""
    spec = families.spec_of(name)
    module = importlib.import_module(f"msft.backend.{engine}.engine")
    tuning = Tuning(parameters=tuple(tensor_shapes(spec)))
    return module.build(spec, Perturbed(spec, 0), tuning, replace(families.RUNTIME, **changes))


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("name", ["t5", "t5, gated, with a head"])
def test_long_and_packed_examples_and_recomputed_layers(engine, name):
    """Logits and gradients are transformers', which sees each example by itself."""
    built, model, batch = build(engine, name, recompute=True), families.oracle(name), rows_of(LONG)
    expected = torch.zeros(*batch.labels.shape, families.VOCABULARY)
    for row, start, border, end in examples_of(batch, LONG):
        ids = torch.from_numpy(batch.input_ids[row : row + 1]).long()
        pair = {"input_ids": ids[:, start:border], "decoder_input_ids": ids[:, border:end]}
        expected[row, border:end] = model(**pair, use_cache=False).logits[0]
    np.testing.assert_allclose(built.logits(batch), expected.detach().numpy(), atol=3e-5, rtol=1e-5)
    labels = torch.from_numpy(batch.labels).long().flatten()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels, ignore_index=IGNORE).backward()
    found = built.gradients(batch)
    for tensor, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        np.testing.assert_allclose(found[tensor], gradient, atol=3e-5 * np.abs(gradient).max(), err_msg=tensor)


@pytest.mark.parametrize("engine", BOTH)
def test_hidden_states_are_those_of_transformers_modules(engine):
    """The encoder's at sources, the decoder's at targets, 0 elsewhere; an example without a target is encoded too."""
    name = "t5"
    built, model, batch = build(engine, name), families.oracle(name), rows_of(SHORT)
    found, seen = built.activations(batch), {}
    names = [*(f"{stack}.block.{number}" for stack in ("encoder", "decoder") for number in range(2))]
    names += ["encoder.final_layer_norm", "decoder.final_layer_norm"]
    assert list(found) == ["shared", *names[:2], names[4], *names[2:4], names[5]]
    for module in names:
        model.get_submodule(module).register_forward_hook(
            lambda _, __, output, module=module: seen.update({module: output[0] if type(output) is tuple else output})
        )
    expected = {module: np.zeros((*batch.labels.shape, 32), np.float32) for module in names}
    for row, start, border, end in examples_of(batch, SHORT):
        ids = torch.from_numpy(batch.input_ids[row : row + 1]).long()
        model(input_ids=ids[:, start:border], decoder_input_ids=ids[:, border:end], use_cache=False)
        for module, state in seen.items():
            place = np.s_[row, start:border] if module.startswith("encoder") else np.s_[row, border:end]
            expected[module][place] = state[0].detach().numpy()
    # The last example has no target, which transformers was not asked for.
    for module in names:
        state = found[module]
        assert module.startswith("decoder") or np.abs(state[1, 20:23]).min() > 0
        state[1, 20:23] = 0
        np.testing.assert_allclose(state, expected[module], atol=2e-5, err_msg=module)
    np.testing.assert_array_equal(
        found["shared"][0, :25], model.shared.weight.detach().numpy()[batch.input_ids[0, :25]]
    )


@pytest.mark.parametrize("engine", BOTH)
def test_rows_without_targets_and_rows_that_break_the_rule(engine):
    built, batch = build(engine, "t5"), rows_of(SHORT)
    nothing = replace(batch, labels=np.full_like(batch.labels, IGNORE))
    assert not built.logits(nothing).any() and built.evaluate(nothing) == (0.0, 0)
    assert {"decoder.block.1", "encoder.block.1"} <= built.activations(nothing).keys()
    # What is added to scores is a bias, which is not decayed.
    assert not any("relative_attention_bias" in tensor or "norm" in tensor for tensor in built.decayed())
    broken = batch.labels.copy()
    broken[0, 11] = IGNORE
    with pytest.raises(RunError, match="has an unsupervised token behind its first supervised"):
        built.evaluate(replace(batch, labels=broken))


def test_half_precision_on_torch_is_near_float32():
    """bfloat16 products under autocast; transformers' clamp of float16 is for that alone."""
    precision = replace(families.RUNTIME.precision, parameters="bfloat16", compute="bfloat16")
    batch, real = rows_of(SHORT), rows_of(SHORT).labels != IGNORE
    found = [build("torch", "t5", **more).logits(batch)[real] for more in ({}, {"precision": precision})]
    assert np.abs(found[0] - found[1]).max() < 0.1 * np.abs(found[0]).max()
    narrow = replace(precision, parameters="float32", compute="float16")
    assert "not clamped" in build("torch", "t5", precision=narrow).describe()["overflow"]
    assert "overflow" not in build("torch", "t5").describe()
