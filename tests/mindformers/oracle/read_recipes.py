"""OUT.json FILE...: what MindFormers reads in each recipe: all of its keys, and the LlamaConfig it builds."""

import json
import sys


def main(out: str, *paths: str) -> None:
    from mindformers.models.llama import LlamaConfig
    from mindformers.tools.register import MindFormerConfig

    result = {}
    for path in paths:
        config = MindFormerConfig(path)
        recipe = json.loads(json.dumps(config, default=str))
        model = LlamaConfig(**config.model.model_config)
        result[path] = {"recipe": recipe, "model": {name: _plain(value) for name, value in vars(model).items()}}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


def _plain(value):
    return value if isinstance(value, bool | int | float | str | None) else str(value)


main(*sys.argv[1:])
