"""MindFormers' own weight converter, as far as it goes without PyTorch.

`names IN.json OUT.json`: its name for each Hugging Face tensor of a list. `concat CKPT OUT.ckpt`: its
`--qkv_concat True` applied to a CKPT.
"""

import json
import sys
import types


def main(what: str, source: str, out: str) -> None:
    # The module names torch.Tensor in annotations; PyTorch itself is only for reading .bin files.
    sys.modules["torch"] = types.ModuleType("torch")
    sys.modules["torch"].Tensor = object
    from mindformers.models.llama.convert_weight import convert_to_qkv_concat, name_replace

    if what == "concat":
        convert_to_qkv_concat(source, out)
        return
    with open(source, encoding="utf-8") as file:
        result = [name_replace(name) for name in json.load(file)]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


main(*sys.argv[1:])
