"""A CKPT's tensors under Hugging Face's names: trainer state left out, concatenated tensors split."""

from msft import console
from msft.convert.file_names import taken_apart
from msft.convert.joined import Joined, rows
from msft.convert.stored import Stored
from msft.errors import InputError
from msft.models.adapters import is_mindformers_adapter
from msft.models.families import FAMILIES, family
from msft.models.family import Family, Rows, in_files
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

_STATE_PREFIXES = ("adam_m.", "adam_v.", "moment1.", "moment2.", "moments.", "accu_grads.")


def are_mindformers(stored: dict[str, Stored | Joined]) -> bool:
    """Whether tensors carry MindFormers' names (a CKPT's, or a safetensors file's that MindSpore wrote)."""
    marks = (".tok_embeddings.embedding_weight", ".attention.w", ".feed_forward.w", ".attention_norm.")
    marks += (".embedding_table", ".gamma")
    # Hugging Face's Llama, and InternLM2, whose files share some of MindFormers' words.
    others = (".self_attn.", ".attention.wqkv.", ".tok_embeddings.weight")
    marked = any(mark in name for name in stored for mark in marks)
    return marked and not any(other in name for name in stored for other in others)


def canonical(stored: dict[str, Stored | Joined], spec: ModelSpec | None, where: str) -> dict[str, Stored | Joined]:
    """Return a CKPT's model tensors by canonical name.

    `spec` is needed only to split `w_qkv`. What is left out (optimizer and trainer state, adapters) is said.
    Raises InputError when two tensors get the same name.
    """
    model = family(spec.family if spec else "llama")
    result: dict[str, Stored | Joined] = {}
    for name, entry in of_model(stored, where).items():
        for new_name, part in _renamed(name, entry, model, spec, where).items():
            if new_name in result:
                raise InputError(f"{where}: two tensors are {new_name!r}, one of them {name!r}")
            result[new_name] = part
    stacked = _stacked(model, spec) if spec and model.mindformers.stacked else {}
    return taken_apart(result, stacked, spec) if stacked else result


def of_model(stored: dict[str, Stored | Joined], where: str) -> dict[str, Stored | Joined]:
    """Return a CKPT's tensors without optimizer and trainer state and adapters; what is left out is said."""
    result: dict[str, Stored | Joined] = {}
    state, adapters = 0, 0
    for name, entry in stored.items():
        if is_mindformers_adapter(name):
            adapters += 1
        elif is_trainer_state(name, entry):
            state += 1
        else:
            result[name] = entry
    if state:
        console.note(f"{where}: left out {state} tensors of optimizer and trainer state")
    if adapters:
        console.warn(f"{where}: left out {adapters} LoRA tensors; pass the same file as adapter to use them")
    return result


def _stacked(model: Family, spec: ModelSpec) -> dict[str, tuple[Rows, ...]]:
    """Which rows of the model's tensors those hold in which the experts of a layer are stacked."""
    found: dict[str, tuple[Rows, ...]] = {}
    for name, shape in tensor_shapes(spec).items():
        if len(shape) == 3:
            for theirs, part in in_files(name, shape, spec, model.mindformers.stacked, str):
                found[theirs] = (*found.get(theirs, ()), part)
    return found


def is_trainer_state(name: str, entry: Stored | Joined) -> bool:
    """Whether a CKPT's tensor is an optimizer moment or a counter (a single number without a path)."""
    counter = "." not in name and sum(entry.info.shape) <= 1
    return counter or name.startswith(_STATE_PREFIXES)


def is_concatenated(name: str) -> bool:
    """Whether a CKPT's tensor is several matrices in one (`qkv_concat`)."""
    return any(f".{cell}." in name for known in FAMILIES.values() for cell in known.mindformers.concatenated)


def _renamed(
    name: str, entry: Stored | Joined, model: Family, spec: ModelSpec | None, where: str
) -> dict[str, Stored | Joined]:
    for cell, modules in model.mindformers.concatenated.items():
        if f".{cell}." in name:
            names = [name.replace(f".{cell}.", f".{module}.") for module in modules]
            sizes = _split_sizes(name, entry, len(modules), spec, where)
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            return {
                new: rows(entry, start, start + size) for new, start, size in zip(names, starts, sizes, strict=True)
            }
    return {model.mindformers.read(name): entry}


def _split_sizes(name: str, entry: Stored | Joined, parts: int, spec: ModelSpec | None, where: str) -> list[int]:
    total = entry.info.shape[0] if entry.info.shape else 0
    if parts == 2:
        sizes = [total // 2, total // 2]
    elif spec is None:
        raise InputError(
            f"{where}: holds {name!r} (query, key and value in one), and splitting it takes the number of "
            "heads: put the model's config.json beside the file or give --config"
        )
    else:
        keys = spec.num_key_value_heads * spec.head_dim
        sizes = [spec.num_attention_heads * spec.head_dim, keys, keys]
    if sum(sizes) != total:
        raise InputError(f"{where}: tensor {name!r} has {total} rows, but the parts in it have {sizes}")
    return sizes
