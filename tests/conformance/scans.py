"""State spaces of both engines on arrays, and the recurrence that they compute, token by token in float64."""

import importlib

import numpy as np
import torch

from msft.backend import line
from msft.models.state_space import StateSpace

CHANNELS = StateSpace(state_size=5, conv_kernel=4, intermediate_size=12, time_step_rank=3)
HEADS = StateSpace(state_size=5, conv_kernel=4, intermediate_size=24, num_heads=6, head_dim=4, n_groups=2)
SPACES = {"mamba": CHANNELS, "mamba2": HEADS}


def random_scan(space, length, seed=0, steps=0.0):
    """What tokens give, and a layer's tensors; larger `steps` are longer time steps."""
    generator = np.random.default_rng(seed)
    wide = space.num_heads or space.intermediate_size
    packed = generator.normal(0, 1, (length, space.packed))
    shape = (wide,) if space.num_heads else (wide, space.state_size)
    decays, biases = generator.normal(0, 0.7, shape), generator.normal(steps, 1, wide)
    return packed.astype(np.float32), [one.astype(np.float32) for one in (decays, biases, generator.normal(1, 1, wide))]


def plain(space, packed, tensors, places):
    """The recurrence of the papers (arXiv 2312.00752, equation 2; 2405.21060, equation 1), torch float64."""
    decays, biases, passed = tensors
    inner, states, groups = space.intermediate_size, space.state_size, max(space.n_groups, 1)
    if space.num_heads:
        inputs, write, read, raw = packed.split((inner, groups * states, groups * states, space.num_heads), 1)
    else:
        inputs, raw, write, read = packed.split((inner, inner, states, states), 1)
    repeat = inner // len(biases)
    steps = torch.nn.functional.softplus(raw + biases).repeat_interleave(repeat, 1)
    falls = -decays.exp().reshape(len(biases), -1).expand(-1, states).repeat_interleave(repeat, 0)
    state, outputs = torch.zeros(inner, states, dtype=torch.float64), []
    for token in range(len(packed)):
        if places[token] == 0:
            state = torch.zeros_like(state)
        into, out = (one[token].reshape(groups, states).repeat_interleave(inner // groups, 0) for one in (write, read))
        step = steps[token][:, None]
        state = (step * falls).exp() * state + step * into * inputs[token][:, None]
        outputs.append((state * out).sum(1) + passed.repeat_interleave(repeat) * inputs[token])
    return torch.stack(outputs)


def plain_results(space, packed, tensors, places, gradient):
    """Outputs of `plain` and the gradients of what tokens give and of the tensors, float64 arrays."""
    leaves = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (packed, *tensors)]
    outputs = plain(space, leaves[0], leaves[1:], places)
    found = torch.autograd.grad(outputs, leaves, torch.tensor(gradient, dtype=torch.float64))
    return outputs.detach().numpy(), [one.numpy() for one in found]


def on_engine(engine, space, packed, tensors, places, gradient):
    """`plain_results` by an engine's scan."""
    module = importlib.import_module(f"msft.backend.{engine}.state_space")
    scan = module.Scan(space)
    if engine == "torch":
        leaves = [torch.tensor(one, requires_grad=True) for one in (packed, *tensors)]
        outputs = scan.forward(leaves[0], tuple(leaves[1:]), torch.from_numpy(places))
        found = torch.autograd.grad(outputs, leaves, torch.from_numpy(gradient))
        return outputs.detach().numpy(), [one.numpy() for one in found]
    import mindspore

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    fill = (0, -len(packed) % line.TILE)
    padded = [np.pad(one, (fill, (0, 0))) for one in (packed, gradient)]
    plan = scan.plan_of(np.pad(places, fill))
    packed_tensor, by_outputs, *own = map(mindspore.Tensor, (*padded, *tensors))
    results = scan.forward(packed_tensor, own, plan)
    outputs = np.concatenate([result.asnumpy()[: module.STRIP] for result in results])[: len(packed)]
    by_packed, by_tensors = scan.backward(by_outputs, packed_tensor, results, own, plan, (0, 1, 2))
    ends = np.cumsum([one.size for one in tensors])[:-1]
    parts = np.split(by_tensors.asnumpy(), ends)
    shaped = [part.reshape(one.shape) for part, one in zip(parts, tensors, strict=True)]
    return outputs, [by_packed.asnumpy()[: len(packed)], *shaped]
