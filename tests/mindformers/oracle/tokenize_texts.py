"""MODEL TEXTS.json OUT.json: the ids that MindFormers' LlamaTokenizer gives each text, begin token and all."""

import json
import sys


def main(model: str, texts: str, out: str) -> None:
    from mindformers.models.llama import LlamaTokenizer

    tokenizer = LlamaTokenizer(vocab_file=model)
    with open(texts, encoding="utf-8") as file:
        result = [tokenizer(text)["input_ids"] for text in json.load(file)]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file)


main(*sys.argv[1:])
