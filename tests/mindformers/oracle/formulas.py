"""CASES.json OUT.json: MindFormers' learning rates and FFN sizes.

CASES: {"schedules": [lr_schedule block ...], "steps": N, "ffn": [[hidden, multiple_of, multiplier] ...]}.
OUT: {"schedules": [[rate at step 0 .. N-1] ...], "ffn": [size ...]}.
"""

import json
import sys

import mindspore as ms


def main(cases: str, out: str) -> None:
    from mindformers.core.lr import build_lr
    from mindformers.models.llama.llama_layer import LlamaFeedForward

    ms.set_context(device_target="CPU")
    with open(cases, encoding="utf-8") as file:
        given = json.load(file)
    rates = []
    for block in given["schedules"]:
        schedule = build_lr(block)
        steps = [ms.Tensor(step, ms.int32) for step in range(given["steps"])]
        rates.append([float(ms.Tensor(schedule(step)).asnumpy().reshape(())) for step in steps])
    sizes = [
        LlamaFeedForward(
            hidden, hidden_dim=4 * hidden, multiple_of=multiple_of, ffn_dim_multiplier=multiplier
        ).hidden_dim
        for hidden, multiple_of, multiplier in given["ffn"]
    ]
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"schedules": rates, "ffn": sizes}, file)


main(*sys.argv[1:])
