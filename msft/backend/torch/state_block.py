"""A block with a state space in place of attention and feed-forward, walked here in place of transformers' forward.

transformers' own loop goes token by token, and does not know where the examples of a row begin.
"""

import functools
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from msft.backend.torch import block
from msft.backend.torch.state_space import Scan
from msft.models.spec import ModelSpec
from msft.models.state_space import StateSpace


def walk(network: nn.Module, spec: ModelSpec, compute: torch.dtype) -> None:
    """Let this module go the way from tokens to the last norm in place of transformers' body and layers."""
    scan = Scan(spec.state_space)
    for number in range(spec.num_hidden_layers):
        layer = network.get_submodule(spec.layer(number).removesuffix("."))
        layer.forward = functools.partial(_through_layer, layer, scan, compute)
    network.base_model.forward = functools.partial(_through_body, network, spec)


def _through_body(network, spec, input_ids, inputs_embeds, attend, **_):
    around = spec.outside
    hidden = network.get_submodule(around.embedding)(input_ids) if inputs_embeds is None else inputs_embeds
    for number in range(spec.num_hidden_layers):
        hidden = network.get_submodule(spec.layer(number).removesuffix("."))(hidden, places=attend)
    return SimpleNamespace(last_hidden_state=network.get_submodule(around.norm)(hidden))


def _through_layer(layer, scan, compute, hidden, places):
    mixer, space = layer.mixer, scan.space
    gate, columns, steps = projected(layer, space, hidden)
    taken = packed(mixer, space, compute, convolved(mixer, space, columns, places), steps)
    outputs = scan.forward(taken.squeeze(0), scanned(mixer, space), places)
    return left(mixer, space, compute, hidden, outputs.unsqueeze(0), gate)


def projected(layer: nn.Module, space: StateSpace, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gate, the convolution's part and (Mamba2) time steps of hidden states [1, tokens, hidden]."""
    wide = layer.mixer.in_proj(layer.norm(hidden))
    if space.num_heads:
        return wide.split((space.intermediate_size, space.convolved, space.num_heads), -1)
    columns, gate = wide.chunk(2, -1)
    return gate, columns, gate


def convolved(mixer: nn.Module, space: StateSpace, columns: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the causal convolution of [1, tokens, channels], activated; it does not reach into other examples."""
    window = [columns]
    for back in range(1, space.conv_kernel):
        shifted = functional.pad(columns, (0, 0, back, 0))[:, : columns.shape[1]]
        window.insert(0, shifted * (places >= back).to(columns.dtype).unsqueeze(-1))
    return mixed_window(mixer, window)


def mixed_window(mixer: nn.Module, window: list[torch.Tensor]) -> torch.Tensor:
    """Return the convolution of what stands under each of its taps, activated."""
    taps = mixer.conv1d.weight.to(window[0].dtype).squeeze(1).unbind(1)
    total = window[0] * taps[0]
    for values, tap in zip(window[1:], taps[1:], strict=True):
        total = torch.addcmul(total, values, tap)
    if mixer.conv1d.bias is not None:
        total = total + mixer.conv1d.bias.to(total.dtype)
    return functional.silu(total)


def packed(mixer: nn.Module, space: StateSpace, compute: torch.dtype, convolved, steps) -> torch.Tensor:
    """Return what the scan takes [1, tokens, packed]."""
    if space.num_heads:
        return torch.cat((convolved, steps), -1)
    low, write_and_read = mixer.x_proj(convolved).split((space.time_step_rank, 2 * space.state_size), -1)
    # The bias is the scan's, in float32.
    steps = block.linear(low, mixer.dt_proj.weight, None, compute)
    return torch.cat((convolved.to(compute), steps, write_and_read), -1)


def scanned(mixer: nn.Module, space: StateSpace) -> tuple[torch.Tensor, ...]:
    """Return the layer's tensors that the scan takes."""
    return mixer.A_log, mixer.dt_bias if space.num_heads else mixer.dt_proj.bias, mixer.D


def left(mixer: nn.Module, space: StateSpace, compute: torch.dtype, hidden, outputs, gate) -> torch.Tensor:
    """Return the hidden states behind the block, for the scan's outputs and the gate."""
    outputs = outputs * functional.silu(gate.float())
    if space.num_heads:
        groups = outputs.unflatten(-1, (space.n_groups, -1))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon)
        outputs = (groups * scale).flatten(-2) * mixer.norm.weight.float()
    hidden = hidden.float() if space.residual_in_fp32 else hidden
    return hidden + block.linear(outputs, mixer.out_proj.weight, mixer.out_proj.bias, compute)
