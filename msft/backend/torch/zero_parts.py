"""What a rank holds under DeepSpeed: a range of the numbers of every tuned tensor, and with stage 3 of every weight."""

import copy
import logging
import os
from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from msft.backend.contract import Place, Runtime
from msft.backend.torch import ops


def library(device: str):
    """Return the module of DeepSpeed, which asks once what it runs on."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def partitions_weights(runtime: Runtime) -> bool:
    """Whether each rank is to hold a part of every weight, tuned or frozen (ZeRO stage 3)."""
    return runtime.strategy == "deepspeed" and runtime.deepspeed["zero_optimization"]["stage"] == 3


class Partitioner:
    """Makes parameters of whole tensors, of which each rank keeps its part at once; all ranks make them together."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.first: nn.Parameter | None = None

    def __call__(self, whole: torch.Tensor) -> nn.Parameter:
        """Return a frozen parameter in the dtype that DeepSpeed holds all of them in."""
        kind = ops.dtype(self.runtime.precision.compute)
        parameter = nn.Parameter(whole.to(kind), requires_grad=False)
        if self.first is None:
            self.first = parameter
            configuration = copy.deepcopy(self.runtime.deepspeed)
            deepspeed = library(self.runtime.device)
            deepspeed.init_distributed()
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=configuration, dtype=kind)
        else:
            self.first.convert_to_zero_parameters(param_list=[parameter])
        return parameter


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, be it partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: Iterable[torch.Tensor], changed_by: int | None = None):
    """Return a context in which parameters are whole; what the rank `changed_by` makes of them, all ranks take over."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(partitioned, changed_by)


def held(parameter: torch.Tensor, moment: str | None = None) -> tuple[int, torch.Tensor]:
    """Return where this rank's range of a tuned parameter's numbers begins, and these in float32.

    The optimizer's weights, or one of its moments (DeepSpeed's name). Ends of ranges that only fill up are left out.
    """
    if not hasattr(parameter, "ds_id"):
        fragment = parameter._hp_mapping
        if fragment is None:
            return 0, torch.empty(0)
        return fragment.lp_fragment_address.start, fragment.get_hp_fragment(moment)
    part = parameter._z3_optimizer.get_local_fp32_param(parameter, moment)
    first = min(len(part) * parameter.ds_zero_partition_rank, parameter.ds_numel)
    return first, part[: parameter.ds_numel - first]


def place(parameter: torch.Tensor) -> Place:
    """Return where this rank's range of a tuned parameter lies; it may be empty."""
    first, numbers = held(parameter)
    return Place(whole_shape(parameter), (first,), (len(numbers),))


def hold(parameter: torch.Tensor, whole: np.ndarray, moment: str | None = None) -> None:
    """Overwrite this rank's range of a tuned parameter's float32 weights, or of a moment, from the whole tensor."""
    first, numbers = held(parameter, moment)
    own = torch.from_numpy(np.array(whole.reshape(-1)[first : first + len(numbers)], np.float32))
    if hasattr(parameter, "ds_id"):
        filled = nn.functional.pad(own, (0, parameter.ds_tensor.numel() - len(own)))
        parameter._z3_optimizer.set_local_hp_param(filled, parameter, moment)
    else:
        numbers.copy_(own)
