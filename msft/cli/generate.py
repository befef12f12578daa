"""`msft generate`: answers to prompts, from a model and an adapter, on either engine."""

import json
from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_generate, argv)


def parser() -> guard.Parser:
    """Return the command's parser."""
    result = guard.Parser(
        prog="msft generate",
        description="Answer prompts. One prompt's answer is printed as it is made; several give a JSON line each.",
    )
    option = result.add_argument
    option("--model", required=True, type=Path, help="model folder, CKPT (config.json beside it) or GGUF")
    option("--adapter", type=Path, help="PEFT folder, or MindFormers' CKPT with LoRA tensors")
    option("--backend", choices=("torch", "mindspore"), help="default: mindspore if it is installed, else torch")
    option("--device", default="auto", help="auto, cpu, cuda or npu (default: auto)")
    option("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="weights and compute (default: fp32)")
    asked = result.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    asked.add_argument("--file", type=Path, help="a text file with one prompt a line")
    option("--system", help="system message of the template")
    option("--raw", action="store_true", help="continue the text as it is, without a template")
    option(
        "--template",
        help="chat (the tokenizer's own; default where it has one), a FastChat name, "
        "llama_factory:NAME or firefly:NAME",
    )
    option("--tokenizer", type=Path, help="tokenizer folder or sentencepiece model (default: the model's)")
    option("--max_new_tokens", type=int, default=256, help="default: 256")
    option("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    option("--top_k", type=int, default=0, help="0 means all tokens (default)")
    option("--top_p", type=float, default=1.0, help="1 means all tokens (default)")
    option("--seed", type=int, default=0, help="of the sampling (default: 0)")
    option("--stop", action="append", default=[], help="text that ends an answer; may be given several times")
    option("--batch_size", type=int, default=8, help="prompts answered at a time (default: 8)")
    option("--lora_alpha", type=float, help="alpha, for an adapter that does not say it (CKPT)")
    return result


def _generate(argv: Sequence[str]) -> None:
    words = parser().parse_args(argv)
    _check(words)
    from msft import console
    from msft.backend.contract import Sampling
    from msft.convert.dtypes import WORDS
    from msft.data.tokenizers import open_tokenizer
    from msft.predict.answers import Answerer
    from msft.predict.loading import end_ids, load_engine, load_spec, load_tokenizer
    from msft.predict.prompts import Prompts, read_prompts

    texts = words.prompt if words.prompt is not None else read_prompts(words.file)
    spec = load_spec(words.model)
    tokenizer = open_tokenizer(words.tokenizer) if words.tokenizer else load_tokenizer(words.model)
    template = _template(words, tokenizer, spec.family)
    prompts = Prompts(tokenizer, template, words.system, is_closed=spec.encoder is not None)
    encoded = [prompts.encode(text) for text in texts]
    engine = load_engine(
        spec, words.model, words.adapter, words.backend, words.device, WORDS[words.dtype], words.lora_alpha
    )
    stop_ids = prompts.stop_ids(end_ids(spec, words.model), words.stop)
    sampling = Sampling(words.max_new_tokens, words.temperature, words.top_k, words.top_p, words.seed, stop_ids)
    answerer = Answerer(engine, tokenizer, sampling, (*words.stop, *prompts.stop_texts()))
    if len(texts) == 1:
        answerer.answer(encoded, on_text=lambda piece: print(piece, end="", flush=True))
        print()
        return
    for start in range(0, len(texts), words.batch_size):
        part = slice(start, start + words.batch_size)
        for text, answer in zip(texts[part], answerer.answer(encoded[part]), strict=True):
            console.say(json.dumps({"prompt": text, "answer": answer}, ensure_ascii=False))


def _template(words, tokenizer, model_type: str) -> str | None:
    """The template asked for, or the one that llama_preprocess trains with; None for --raw."""
    from msft import console
    from msft.data.templates import CHAT, default_template

    if words.raw or words.template:
        return words.template
    template = default_template(tokenizer, model_type)
    if template != CHAT:
        console.note(f"the tokenizer has no chat template: prompts stand in {template} (--template, --raw)")
    return template


def _check(words) -> None:
    from msft.errors import InputError

    problems = []
    if words.raw and (words.template or words.system):
        problems.append("--raw: goes with neither --template nor --system")
    if words.max_new_tokens < 1:
        problems.append(f"--max_new_tokens: must be 1 or more, not {words.max_new_tokens}")
    if words.batch_size < 1:
        problems.append(f"--batch_size: must be 1 or more, not {words.batch_size}")
    if words.temperature < 0:
        problems.append(f"--temperature: must be 0 or more, not {words.temperature:g}")
    if words.top_k < 0:
        problems.append(f"--top_k: must be 0 or more, not {words.top_k}")
    if not 0 < words.top_p <= 1:
        problems.append(f"--top_p: must be above 0 and at most 1, not {words.top_p:g}")
    if "" in words.stop:
        problems.append("--stop: an empty text would end every answer")
    if problems:
        raise InputError(*problems)
