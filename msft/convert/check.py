"""Whether a weight source holds exactly the tensors that a model needs."""

import numpy as np

from msft import console
from msft.convert.dtypes import FLOATS
from msft.convert.source import TensorSource
from msft.errors import InputError, did_you_mean
from msft.models.families import family
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

MAX_PROBLEMS = 20

# Buffers that old versions of transformers and Meta's code saved; every engine computes them itself.
_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rope.freqs",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    # A first release of T5 has positions where it attends to the encoder, which nothing ever added.
    "layer.1.EncDecAttention.relative_attention_bias.weight",
)


def check_against(spec: ModelSpec, source: TensorSource) -> None:
    """Raise one InputError that names every missing, unexpected, mis-shaped or integer tensor and its file.

    Left-over rotary buffers are passed over; so is the head of a model whose config ties it, which is said.
    """
    shapes = tensor_shapes(spec)
    unexpected = [name for name in source.tensors if name not in shapes and not is_buffer(name)]
    head = spec.head
    if head in unexpected and source.tensors[head].shape == shapes[spec.embedding]:
        unexpected.remove(head)
        console.note(f"{source.file_of(head)}: {head} is left out; the config ties the head to the embedding")
    unexpected = _without_copies(unexpected, spec, source)
    missing = [name for name in shapes if name not in source.tensors]
    place, near = _place(source), unexpected if len(missing) <= MAX_PROBLEMS else []
    problems = [
        f"{place}: tensor {name!r} {list(shapes[name])} is missing{_hint(name, near, head)}" for name in missing
    ]
    problems += [_problem(name, shape, source) for name, shape in shapes.items() if name in source.tensors]
    problems = [problem for problem in problems if problem]
    problems += [
        f"{source.file_of(name)}: unexpected tensor {name!r} {list(source.tensors[name].shape)}" for name in unexpected
    ]
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"... and {len(problems) - MAX_PROBLEMS} more tensors that do not fit the config"]
    if problems:
        raise InputError(*problems)


def _without_copies(unexpected: list[str], spec: ModelSpec, source: TensorSource) -> list[str]:
    """What is unexpected but for equal copies of tensors that the model has, which are passed over; that is said."""
    copies = dict(family(spec.family).files.copies)
    found = {name: copies[name] for name in unexpected if copies.get(name) in source.tensors}
    equal = [name for name, of in found.items() if np.array_equal(source.read(name), source.read(of))]
    if equal:
        console.note(f"{source.file_of(equal[0])}: {', '.join(equal)} left out; equal to {copies[equal[0]]}")
    return [name for name in unexpected if name not in equal]


def is_buffer(name: str) -> bool:
    """Whether a tensor is a rotary buffer that some files hold and no engine needs, or T5's table of no use."""
    return name.endswith(_BUFFERS)


def _hint(name: str, near: list[str], head: str) -> str:
    return "; is the head tied (tie_word_embeddings)?" if name == head else did_you_mean(name, near)


def _problem(name: str, shape: tuple[int, ...], source: TensorSource) -> str:
    info, where = source.tensors[name], source.file_of(name)
    if info.shape != shape:
        return f"{where}: tensor {name!r} has shape {list(info.shape)}, but the config says {list(shape)}"
    if info.dtype not in FLOATS:
        return f"{where}: tensor {name!r} holds {info.dtype}; quantised weights are not supported"
    return ""


def _place(source: TensorSource) -> str:
    files = sorted({source.file_of(name) for name in source.tensors})
    if not files:
        return "the weights"
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
