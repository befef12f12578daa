"""Compile a step for many devices by MindSpore's parallel compiler, run nothing, and print how it cut the parameters.

MindSpore refuses this mode where its device is the CPU. So the name of the device is changed in this process's memory
alone, from CPU to Ascend, after the last thing was computed. Its compiler then stops before it would need a device
(MS_DEV_PRECOMPILE_ONLY). Without a communicator it takes the world to be 2048 devices.

    python -m tests.conformance.semi_auto_program PLAN TUNING RANK FOLDER
"""

import ctypes
import json
import os
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

WORLD = 2048


def main(plan_text, tuning_name, rank, folder):
    import mindspore
    from mindspore import Tensor
    from mindspore.graph.api import _cell_graph_executor

    from msft.backend import cuts
    from msft.backend.mindspore.whole_model import WholeModel
    from msft.backend.mindspore.whole_step import WholeAdamW, stacked
    from msft.backend.plan import Plan
    from tests.conformance import tiny_engines

    plan = Plan(**json.loads(plan_text))
    assert plan.devices == WORLD
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    file = str(Path(folder) / f"ckpt_strategy_rank_{rank}.ckpt")
    settings = {**cuts.context(plan, rank), "strategy_ckpt_config": {"save_file": file}}
    mindspore.set_auto_parallel_context(device_num=WORLD, global_rank=rank, **settings)
    config = {**tiny_engines.UNTIED, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    tuning = {"full": tiny_engines.full, "lora": lambda config: tiny_engines.lora(config, 0.1)}[tuning_name](config)
    runtime, spec = replace(tiny_engines.RUNTIME, plan=plan), tiny_engines.spec_of(config)
    model = WholeModel(spec, tiny_engines.Perturbed(spec, 0), tuning, runtime, plan)
    step = WholeAdamW(model, runtime.optimizer, runtime.max_grad_norm)._program(plan.micro_batches)
    step.set_train()
    batch = stacked([tiny_engines.batch(0, rows=plan.data)] * plan.micro_batches)
    inputs = [Tensor(number, mindspore.float32) for number in (0.1, 1.0, 1.0, 1.0)]
    inputs += model.inputs(batch, 1.0, 0)
    rename_device("CPU", "Ascend")
    _cell_graph_executor.compile(step, *inputs, phase="train")
    found = {name: list(cut[2]) for name, cut in step.parameter_layout_dict.items() if name in model.tensors}
    moments = {name: list(cut[2]) for name, cut in step.parameter_layout_dict.items() if name.startswith("adam_")}
    print(json.dumps({"parameters": found, "moments": moments}), flush=True)
    # The runtime would look for Ascend on its way out.
    os._exit(0)


def rename_device(old, new):
    """Overwrite the text of MindSpore's device target, which is a length, a capacity, a count and its characters."""
    from mindspore._c_expression import MSContext, ms_ctx_param

    target = MSContext.get_instance()
    header = re.escape(struct.pack("Q", len(old)))
    pattern = re.compile(header + rb".\0{7}.{8}" + re.escape(old.encode() + b"\0"), re.S)
    for address in places_of(pattern):
        before = ctypes.string_at(address, 40)
        ctypes.memmove(address + 24, new.encode() + b"\0", len(new) + 1)
        ctypes.memmove(address, struct.pack("QQ", len(new), len(new)), 16)
        if target.get_param(ms_ctx_param.device_target) == new:
            return
        ctypes.memmove(address, before, 40)
    raise RuntimeError("MindSpore's device target was not found in memory")


def places_of(pattern):
    """Addresses of what matches in this process's writable memory."""
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            span, mode, *rest = line.split()
            start, end = (int(number, 16) for number in span.split("-"))
            if not mode.startswith("rw") or "[stack]" in rest or end - start > 2**30:
                continue
            memory.seek(start)
            try:
                held = memory.read(end - start)
            except OSError:  # a device's memory
                continue
            yield from (start + match.start() for match in pattern.finditer(held) if match.start() % 8 == 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
