"""Adapters in transformers' network: peft's LoRA layers with this engine's first values, dropout and operators."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from msft.backend import slices
from msft.backend.contract import Lora, Runtime
from msft.backend.mesh import Mesh
from msft.backend.torch import block, ops, placed, replaced


def add(network: nn.Module, lora: Lora, runtime: Runtime, mesh: Mesh, keep: Callable | None):
    """Put adapters into a network and return peft's model of it; `keep` makes a frozen parameter of a whole tensor.

    None: the parameters have no values yet.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.modules),
        init_lora_weights=False,
        # peft's wrapper of this kind asks for what transformers' classes have.
        task_type="CAUSAL_LM" if hasattr(network, "prepare_inputs_for_generation") else None,
    )
    tuned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    adapted = get_peft_model(network, config)
    for parameter in tuned:
        parameter.requires_grad_()
    for module in lora.modules:
        layer = network.get_submodule(module)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        if keep is None:
            a.weight = nn.Parameter(torch.empty(lora.rank, layer.in_features, device="meta"))
            b.weight = nn.Parameter(torch.empty(layer.out_features, lora.rank, device="meta"))
        else:
            inputs, outputs = layer.in_features, layer.out_features
            found = first_values(module, inputs, outputs, lora, runtime, mesh)
            a.weight, b.weight = (keep(whole).requires_grad_() for whole in found)
        _, keys = slices.adapter_start(module, layer.in_features, lora, runtime.seed, mesh)
        layer.dropout_features = ops.from_numpy(keys, runtime.device, "int32")
        layer.dropout_tokens = None
        layer.forward = functools.partial(_adapted_linear, layer, lora.dropout)
    return adapted


def first_values(
    module: str, inputs: int, outputs: int, lora: Lora, runtime: Runtime, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first values of a module's A and B, this rank's slices; `inputs` and `outputs` are those it has."""
    drawn, _ = slices.adapter_start(module, inputs, lora, runtime.seed, mesh)
    return ops.from_numpy(drawn, runtime.device, "float32"), torch.zeros(outputs, lora.rank, device=runtime.device)


def _adapted_linear(layer: nn.Module, probability: float, hidden: torch.Tensor) -> torch.Tensor:
    """What peft's LoRA layer computes, with dropout by counters, as one operator where the base is frozen."""
    base = layer.base_layer
    if layer.disable_adapters:
        return base(hidden)
    a, b = placed.local(layer.lora_A["default"]), placed.local(layer.lora_B["default"])
    scaling = layer.scaling["default"]
    keep = None
    if layer.dropout_tokens is not None and probability:
        keep = ops.keep_mask(layer.dropout_tokens, layer.dropout_features, probability)
    bias = block.bias(base)
    if base.weight.requires_grad or (bias is not None and bias.requires_grad):
        return base(hidden) + block.low_rank(hidden, a, b, scaling, keep, probability)
    return block.adapted_linear(hidden, replaced.weight(base), bias, a, b, scaling, keep, probability)
