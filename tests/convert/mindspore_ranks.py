"""Distributed checkpoints as MindSpore writes them: slices cut by hand, strategy files by MindSpore's own classes."""

import itertools
from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """A parameter's layout in MindSpore's terms; an axis of `tensor_map` may be cut by several dimensions (a list)."""

    devices: list[int]
    tensor_map: list
    step: int = 0
    size: int = 0


def slices(array: np.ndarray, cut: Cut) -> list[np.ndarray]:
    """Each rank's slice, in the order of ranks."""
    everybody = list(np.ndindex(*cut.devices))
    result = []
    for own in everybody:
        part = array
        used = []
        for axis, dims in enumerate(cut.tensor_map):
            for dim in dims if isinstance(dims, list) else [dims]:
                if dim != -1:
                    used.append(len(cut.devices) - 1 - dim)
                    part = np.split(part, cut.devices[used[-1]], axis)[own[used[-1]]]
        if cut.step and cut.size:
            twins = [other for other in everybody if all(other[dim] == own[dim] for dim in used)]
            size = len(twins) if cut.size == -1 else cut.size
            part = np.split(part, size)[twins.index(own) % size]
        result.append(part)
    return result


def strategy_bytes(cuts: dict[str, Cut], stage: int = 0) -> bytes:
    """A strategy file's content, by MindSpore's protobuf classes."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    message = ParallelStrategyMap(current_stage=1)
    for node in ("MatMul-op0", "Add-op1"):
        item = message.parallel_strategy_item.add(node_name=node)
        item.parallel_strategys.stage = stage
        item.parallel_strategys.parallel_strategy.add().dim.extend([1, 2])
    for name, cut in cuts.items():
        layouts = message.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.dev_matrix.add().dim.extend(cut.devices)
        if any(isinstance(axis, list) for axis in cut.tensor_map):
            for axis in cut.tensor_map:
                layouts.tensor_map.add().dim.extend(axis if isinstance(axis, list) else [axis])
        else:
            layouts.tensor_map.add().dim.extend(cut.tensor_map)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field, layouts.opt_weight_shard_step, layouts.opt_weight_shard_size = 0, cut.step, cut.size
    return message.SerializeToString()


def write_distributed(folder, arrays, cuts: list[dict[str, Cut]], step="1_2", extra=None):
    """Write `folder`/checkpoint/rank_K and `folder`/strategy with mindspore; `cuts` has one entry a pipeline stage.

    Every rank also has `extra` arrays, moments of its slices and counters. Returns both folders.
    """
    import mindspore

    first = 0
    (folder / "strategy").mkdir(parents=True, exist_ok=True)
    for stage, stage_cuts in enumerate(cuts):
        ranks = int(np.prod(next(iter(stage_cuts.values())).devices))
        parts = {name: slices(arrays[name], cut) for name, cut in stage_cuts.items()}
        for rank in range(ranks):
            own = {name: part[rank] for name, part in parts.items()}
            moments = {f"{kind}.{name}": part * 2 for name, part in own.items() for kind in ("adam_m", "adam_v")}
            state = {"global_step": np.array([2], np.int32), "epoch_num": np.array(1, np.int32)}
            place = folder / "checkpoint" / f"rank_{first + rank}"
            place.mkdir(parents=True, exist_ok=True)
            everything = itertools.chain(own.items(), moments.items(), state.items(), (extra or {}).items())
            mindspore.save_checkpoint(
                [{"name": name, "data": mindspore.Tensor(np.ascontiguousarray(part))} for name, part in everything],
                str(place / f"llama_rank_{first + rank}-{step}.ckpt"),
            )
            file = folder / "strategy" / f"ckpt_strategy_rank_{first + rank}.ckpt"
            file.write_bytes(strategy_bytes(stage_cuts, stage))
        first += ranks
    return folder / "checkpoint", folder / "strategy"


# MindFormers' Llama: which axis of a matrix model_parallel cuts.
BY_ROWS = (".wq.", ".wk.", ".wv.", ".w1.", ".w3.", "lm_head", "tok_embeddings")
BY_COLUMNS = (".wo.", ".w2.")
# The adapter's factor that has not the axis which is cut (tests adapt attention alone).
UNCUT = ("lora_a", "lora_b")


def llama_cuts(arrays, data: int, model: int, shard: int = 0) -> dict[str, Cut]:
    """How MindFormers cuts a Llama over `data` x `model` ranks; `shard` is the optimizer's (-1: all copies)."""
    result = {}
    for name, array in arrays.items():
        tensor_map = [-1] * array.ndim
        if name.endswith(UNCUT[0]) and ".wo." not in name or name.endswith(UNCUT[1]) and ".wo." in name:
            pass
        elif any(mark in name for mark in BY_ROWS):
            tensor_map[0] = 0
        elif any(mark in name for mark in BY_COLUMNS):
            tensor_map[1] = 0
        cut = tensor_map != [-1] * array.ndim
        # What model_parallel does not cut has copies along both dimensions.
        copies = data if cut else data * model
        step = model if cut else 1
        parts = (copies if shard == -1 else shard) * (model if tensor_map[0] == 0 else 1)
        sharded = shard and copies > 1 and array.shape[0] % parts == 0
        result[name] = Cut([data, model], tensor_map, *((step, shard) if sharded else (0, 0)))
    return result
