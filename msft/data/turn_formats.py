"""The conversation templates of LLaMA-Factory and Firefly, written as Jinja, by the names 'llama_factory:llama3' ...

Both toolkits build a conversation of slots: something before it, the system message, and each side's words. All of an
answer's slot is supervised, also what stands behind its end mark, so the slot is marked as `{% generation %}`.
Templates that end an answer with a label which no text has (LLaMA-Factory's `efficient_eos`), and those that have
token ids of their own (ChatGLM), are not among them.
"""

import json
import re
from typing import NamedTuple

from msft.data.chat_template import ChatTemplate
from msft.data.tokenizers import Tokenizer
from msft.errors import InputError, did_you_mean


class TurnFormat(NamedTuple):
    """Slots with `{content}`, `{bos}` and `{eos}` in them; `system` "" leaves system messages out.

    `default_system` is said where the data has none. With `inside` the system slot is part of the first question.
    `trims` strips the words; `thinks` puts an empty thought before answers without one.
    """

    user: str
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    prefix: str = ""
    default_system: str = ""
    inside: bool = False
    trims: bool = False
    thinks: bool = False


_HELPFUL = "You are a helpful assistant."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_INTERN = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language "
    "chosen by the user such as English and 中文."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)

_CHATML = TurnFormat(
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{content}<|im_end|>\n",
    system="<|im_start|>system\n{content}<|im_end|>\n",
)
_GEMMA = TurnFormat(
    user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
    assistant="{content}<end_of_turn>\n",
    system="{content}\n\n",
    prefix="{bos}",
    inside=True,
)
_LLAMA3 = TurnFormat(
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    assistant="{content}<|eot_id|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    prefix="{bos}",
)
_PHI = TurnFormat(
    user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
    assistant="{content}<|end|>\n",
    system="<|system|>\n{content}<|end|>\n",
)

LLAMA_FACTORY = {
    "alpaca": TurnFormat(
        user="### Instruction:\n{content}\n\n### Response:\n",
        assistant="{content}{eos}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "chatml": _CHATML,
    "deepseek": TurnFormat("User: {content}\n\nAssistant:", system="{content}\n\n", prefix="{bos}"),
    "deepseek3": TurnFormat("<｜User｜>{content}<｜Assistant｜>", prefix="{bos}"),
    "default": TurnFormat(
        user="Human: {content}{eos}\nAssistant:", assistant="{content}{eos}\n", system="System: {content}{eos}\n"
    ),
    "empty": TurnFormat("{content}", "{content}"),
    "gemma": _GEMMA,
    "intern": TurnFormat(
        user="<|User|>:{content}\n<|Bot|>:",
        assistant="{content}<eoa>\n",
        system="<|System|>:{content}\n",
        prefix="{bos}",
        default_system=_INTERN,
    ),
    "intern2": _CHATML._replace(prefix="{bos}", default_system=_INTERN),
    "llama2": TurnFormat(user="{bos}[INST] {content} [/INST]", system="<<SYS>>\n{content}\n<</SYS>>\n\n", inside=True),
    "llama2_zh": TurnFormat(
        user="{bos}[INST] {content} [/INST]",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        default_system="You are a helpful assistant. 你是一个乐于助人的助手。",
        inside=True,
    ),
    "llama3": _LLAMA3,
    "ministral": TurnFormat("[INST]{content}[/INST]", system="{content}\n\n", prefix="{bos}", inside=True),
    "mistral": TurnFormat(
        user="[INST] {content}[/INST]", assistant=" {content}{eos}", system="{content}\n\n", prefix="{bos}", inside=True
    ),
    "openchat": TurnFormat("GPT4 Correct User: {content}{eos}GPT4 Correct Assistant:", prefix="{bos}"),
    "orion": TurnFormat("Human: {content}\n\nAssistant: {eos}", prefix="{bos}"),
    "phi": _PHI,
    "phi4": TurnFormat(
        user="<|im_start|>user<|im_sep|>{content}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant="{content}<|im_end|>",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
    ),
    "qwen": _CHATML._replace(default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _CHATML._replace(thinks=True),
    "qwen3_nothink": _CHATML,
    "smollm": _CHATML,
    "smollm2": _CHATML._replace(default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "vicuna": TurnFormat("USER: {content} ASSISTANT:", default_system=_VICUNA),
    "xverse": TurnFormat("Human: {content}\n\nAssistant: "),
    "yi": _CHATML,
    "zephyr": TurnFormat(
        user="<|user|>\n{content}{eos}<|assistant|>\n",
        system="<|system|>\n{content}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
    "ziya": TurnFormat("<human>:{content}\n<bot>:", "{content}\n"),
}

# Firefly's own words: `plain` is what it did before it had templates, and is called so here alone.
_FIREFLY = {
    "baichuan": TurnFormat("<reserved_102>{content}<reserved_103>", "{content}</s>", ""),
    "baichuan2": TurnFormat("<reserved_106>{content}<reserved_107>", "{content}</s>", ""),
    "deepseek": TurnFormat("User: {content}\n\nAssistant: ", "{content}<｜end▁of▁sentence｜>", ""),
    "default": TurnFormat("User: {content}\nAssistant: ", "{content} {eos}", "System: {content}\n\n"),
    "internlm": TurnFormat(
        "<|User|>:{content}\n<|Bot|>:", "{content}</s>\n", "<|System|>:{content}\n", default_system=_INTERN
    ),
    "internlm2": _CHATML._replace(default_system=_INTERN),
    "llama2": TurnFormat(
        "[INST]{content}[/INST]", "{content} </s>", "<<SYS>>\n{content}\n<</SYS>>\n\n", default_system=_LLAMA_2
    ),
    "minicpm": TurnFormat("<用户>{content}<AI>", "{content}</s>", ""),
    "mistral": TurnFormat("[INST]{content}[/INST]", "{content}</s>", "", prefix="<s>"),
    "mixtral": TurnFormat("[INST]{content}[/INST]", "{content}</s>", "", prefix="<s>"),
    "orion": TurnFormat("Human: {content}\n\nAssistant: </s>", "{content}</s>", "", prefix="<s>"),
    "qwen": _CHATML._replace(default_system=_HELPFUL),
    "vicuna": TurnFormat("USER: {content} ASSISTANT:", "{content}</s>", "{content}\n", default_system=_VICUNA),
    "xverse": TurnFormat("Human: {content}\n\nAssistant: ", "{content}<|endoftext|>", ""),
    "yi": _CHATML,
    "zephyr": TurnFormat("<|user|>\n{content}</s>\n<|assistant|>\n", "{content}</s>\n", "<|system|>\n{content}</s>"),
    "ziya2": TurnFormat("<human>:{content} <bot>:", "{content}</s>", ""),
}
FIREFLY = {name: known._replace(trims=True) for name, known in _FIREFLY.items()} | {
    "plain": TurnFormat("{content}{eos}", "{content}{eos}", "", prefix="{bos}")
}
TOOLKITS = {"llama_factory": LLAMA_FACTORY, "firefly": FIREFLY}


def is_turn_format(name: str) -> bool:
    """Whether a template's name is one of another toolkit's, such as 'firefly:qwen'."""
    return name.partition(":")[0] in TOOLKITS and ":" in name


def open_turn_format(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return another toolkit's template for a tokenizer; raises InputError listing the known ones."""
    toolkit, _, own = name.partition(":")
    formats = TOOLKITS[toolkit]
    if own not in formats:
        known = ", ".join(f"{toolkit}:{each}" for each in formats)
        near = did_you_mean(name, [f"{toolkit}:{each}" for each in formats])
        raise InputError(f"--template: {name!r} is unknown{near} (known: {known})")
    return ChatTemplate(jinja(formats[own]), dict(tokenizer.named_tokens), name)


_TURNS = (
    '{% if messages[0].role == "system" %}{% set system, turns = messages[0].content, messages[1:] %}'
    '{% else %}{% set system, turns = "", messages %}{% endif %}'
)


def jinja(known: TurnFormat) -> str:
    """Return the Jinja template that writes conversations so."""
    question = "message.content | trim" if known.trims else "message.content"
    answer, system = question, "system | trim" if known.trims else "system"
    if known.thinks:
        thought = '"<think>" in message.content or "</think>" in message.content'
        answer = f'("" if {thought} else "<think>\\n\\n</think>\\n\\n") ~ message.content'
    written = f"({_written(known.system, f'({system})')})"
    if known.inside:
        question = f'({written} if loop.first and system else "") ~ {question}'
    before = "" if known.inside or not known.system else f"{{% if system %}}{{{{ {written} }}}}{{% endif %}}"
    return (
        f"{_TURNS}{{% set system = system or {_literal(known.default_system)} %}}"
        f"{{{{ {_written(known.prefix, '')} }}}}{before}"
        '{% for message in turns %}{% if message.role == "user" %}'
        f"{{{{ {_written(known.user, f'({question})')} }}}}"
        f"{{% else %}}{{% generation %}}{{{{ {_written(known.assistant, f'({answer})')} }}}}{{% endgeneration %}}"
        "{% endif %}{% endfor %}"
    )


def _written(slot: str, content: str) -> str:
    """A slot as a Jinja expression."""
    names = {"{content}": content, "{bos}": "bos_token", "{eos}": "eos_token"}
    parts = [part for part in re.split(r"(\{content\}|\{bos\}|\{eos\})", slot) if part]
    return " ~ ".join(names.get(part) or _literal(part) for part in parts) or '""'


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
