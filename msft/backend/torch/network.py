"""transformers' network of a model, filled from any weight source, with this engine's operators in its modules."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from msft.backend import names, slices, stages
from msft.backend.contract import Runtime, Tuning
from msft.backend.torch import block, elsewhere, experts, ops, replaced, skeleton, state_block
from msft.models import rope
from msft.models.families import family
from msft.models.shapes import linear_modules, tensor_shapes
from msft.models.spec import ModelSpec

# The name under which transformers knows this engine's attention: whatever `attend` a call of the model brings along.
ATTENTION = "msft"


def _attention(module, query, key, value, attention_mask, scaling, attend, **_):
    return attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


def load(
    spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, parts: block.Parts, keep: Callable | None
) -> nn.Module:
    """Return the network with its weights as `keep` makes parameters of them; None: they have no values yet."""
    rope.check(spec)
    described = family(spec.family)
    network = skeleton.Skeleton(spec, runtime.device) if described.is_ported else _of_transformers(spec)
    tuned, precision = set(tuning.parameters), runtime.precision
    elsewhere.leave_out(network, spec, source.mesh)
    shapes = tensor_shapes(spec)
    for name in stages.own(shapes, spec, source.mesh):
        if keep is None:
            kind = ops.dtype(names.computed_dtype(name, name in tuned, precision, spec))
            shape = slices.own_shape(name, shapes[name], source.mesh)
            parameter = nn.Parameter(torch.empty(shape, dtype=kind, device="meta"), requires_grad=False)
        else:
            parameter = keep(read(spec, source, name, name in tuned, runtime))
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, parameter)
    if spec.encoder:
        _share_embedding(network, spec)
    elif stages.is_own(spec.embedding, spec, source.mesh):
        network.tie_weights()
    if hasattr(network.base_model, "rotary_emb") and not isinstance(network, skeleton.Skeleton):
        _rebuild_rotary(network, runtime.device)
    # transformers zeroes the gradient of the padding row, which is a real token where pad = eos.
    network.get_submodule(spec.outside.embedding).padding_idx = None
    compute = ops.dtype(precision.compute)
    for module in stages.own(linear_modules(spec), spec, source.mesh):
        part = network.get_submodule(module)
        part.forward = functools.partial(replaced.linear, part, compute)
    if described.is_walked or described.is_ported:
        replaced.walk(network, spec)
    if spec.state_space:
        state_block.walk(network, spec, compute)
    for module in network.modules():
        replacement = replaced.FORWARDS.get(type(module).__name__)
        if replacement:
            module.forward = functools.partial(replacement, module, parts)
    experts.place(network, spec, parts, compute)
    return network


def _share_embedding(network: nn.Module, spec: ModelSpec) -> None:
    """Give both stacks the embedding; transformers' `tie_weights` would give it to a head of its own as well."""
    embedding = network.get_submodule(spec.outside.embedding)
    network.encoder.set_input_embeddings(embedding)
    network.decoder.set_input_embeddings(embedding)
    if spec.tie_word_embeddings:
        network.lm_head.weight = embedding.weight


def read(spec: ModelSpec, source, name: str, is_tuned: bool, runtime: Runtime) -> torch.Tensor:
    """Return a weight as it is computed with, on the device."""
    tensor = ops.from_numpy(source.read(name), runtime.device, "float32" if is_tuned else runtime.precision.parameters)
    # autocast does not widen, and keeps a copy of each weight that it narrows until the backward pass.
    return tensor.to(ops.dtype(names.computed_dtype(name, is_tuned, runtime.precision, spec)))


def _of_transformers(spec: ModelSpec) -> nn.Module:
    """transformers' class without values, its attention this engine's."""
    kind = family(spec.family)
    # A copy: transformers writes into what is in it.
    values = copy.deepcopy(kind.native(spec) if kind.native else spec.hf_config)
    if values.get("rope_scaling") and spec.rope_scaling:
        # Under the name that transformers has for it now.
        values["rope_scaling"] = {**spec.rope_scaling}
    config = AutoConfig.for_model(**{**values, "return_dict": True})
    # Dropout is the adapters' own alone.
    for name in config.to_dict():
        if "dropout" in name or name.endswith("_pdrop"):
            setattr(config, name, 0.0)
    if spec.experts:
        config.output_router_logits = False
    how = "eager" if kind.is_walked or spec.state_space or spec.encoder else ATTENTION
    model_class = AutoModelForSeq2SeqLM if spec.encoder else AutoModelForCausalLM
    with torch.device("meta"):
        return model_class.from_config(config, attn_implementation=how)


def _rebuild_rotary(network: nn.Module, device: str) -> None:
    """Buffers built under the meta device hold no numbers; each batch sets the frequencies of `models/rope.py`.

    They stay 0, which turns nothing, where a family has none.
    """
    rotary = type(network.base_model.rotary_emb)(network.config).to(device)
    rotary.rope_type = "default"
    rotary.inv_freq.zero_()
    network.base_model.rotary_emb = rotary
