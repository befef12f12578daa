"""How MindFormers' CKPTs hold models whose queries, keys and values are one matrix on Hugging Face's side."""

from collections.abc import Sequence

from msft.models.family import CkptTensor, Rows
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec

# In the name of a tensor that is split in three: 1 for the queries, 2 for the keys, 3 for the values.
NUMBER = "{}"


def split_layout(
    spec: ModelSpec, renames: Sequence[tuple[str, str]], transposed: Sequence[str]
) -> dict[str, CkptTensor]:
    """Return what each tensor of a CKPT holds; `renames` are (canonical, in a CKPT), replaced in this order.

    A tensor whose new name has a `NUMBER` is split in three. `transposed` are the modules whose weights are transposed
    first.
    """
    found = {}
    for name, shape in tensor_shapes(spec).items():
        is_turned = name.endswith(tuple(f".{module}.weight" for module in transposed))
        rows, new = shape[1 if is_turned else 0], name
        for ours, theirs in renames:
            new = new.replace(ours, theirs)
        if NUMBER not in new:
            found[new] = CkptTensor((Rows(name, 0, rows),), is_turned)
            continue
        for number in range(3):
            found[new.replace(NUMBER, str(number + 1))] = CkptTensor(_third(name, rows, number, spec), is_turned)
    return found


def _third(name: str, rows: int, number: int, spec: ModelSpec) -> tuple[Rows, ...]:
    """The rows of all queries, keys or values of as many heads of each."""
    blocks = spec.num_attention_heads if spec.block.is_grouped else 1
    size = rows // blocks // 3
    starts = [(3 * block + number) * size for block in range(blocks)]
    return tuple(Rows(name, start, start + size) for start in starts)
