"""OUT.json FILE...: the recipes as MindFormers' own YAML reader sees them, keyed by file."""

import json
import sys


def main(out: str, *paths: str) -> None:
    from mindformers.models.llama import LlamaConfig
    from mindformers.tools.register import MindFormerConfig

    result = {}
    for path in paths:
        config = MindFormerConfig(path)
        model = LlamaConfig(**config.model.model_config)
        result[path] = {
            "config": json.loads(json.dumps(config, default=str)),
            "model": {name: value for name, value in vars(model).items() if isinstance(value, (int, float, str))},
        }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


main(*sys.argv[1:])
