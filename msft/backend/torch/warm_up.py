"""Compiling the parts of a block before the first step."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from msft.backend import stages
from msft.backend.torch import attention, zero_parts
from msft.errors import InputError

if TYPE_CHECKING:
    from msft.backend.torch.decoder import Decoder

# Tokens that compile a block's parts: no other size of a model is equal to it.
TOKENS = 13


def compile_parts(decoder: "Decoder") -> float:
    """Compile the parts of a block by a few tokens' way through one and back; return the seconds it took."""
    began, tokens = time.perf_counter(), TOKENS * decoder.mesh.tensor
    positions = decoder.tensor(np.arange(tokens)[None])
    segments = attention.Segments(np.array([[0, tokens, 0, tokens]]), decoder.runtime.device)

    def attend(_, query, key, value, scale):
        return decoder.attention(query, key, value, segments, scale)

    try:
        if decoder.is_fsdp:
            _through_whole(decoder, tokens, attend)
            return time.perf_counter() - began
        first = decoder.network.get_submodule(decoder.spec.layer(stages.layers(decoder.spec, decoder.mesh).start)[:-1])
        settings = {"dtype": decoder.hidden_dtype, "device": positions.device, "requires_grad": True}
        hidden = torch.zeros(decoder.shape_of(tokens), **settings)
        with decoder.autocast(), zero_parts.gathered(first.parameters()):
            rotation = decoder.body.rotary_emb(hidden, positions)
            output = first(hidden, position_embeddings=rotation, attend=attend)
            torch.autograd.grad(output.sum(), hidden)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"torch_compile: {why}; install one, or leave torch_compile out") from error
    return time.perf_counter() - began


def _through_whole(decoder: "Decoder", tokens: int, attend: Callable) -> None:
    """The way through a sharded model, whose blocks are gathered from its root on."""
    positions = np.arange(tokens)[None]
    decoder.run(positions, positions, attend).sum().backward()
    for parameter in decoder.network.parameters():
        parameter.grad = None
