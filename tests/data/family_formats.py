"""The prompts of every family's chat releases as chat templates, with the special tokens they are made of.

The templates are written for the tests in the manner of the releases' own; base models have none.
"""

from typing import NamedTuple

CHATML = """{{- bos_token }}{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
QWEN = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}""" + CHATML.replace("{{- bos_token }}", "")
LLAMA3 = """{{- bos_token }}{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
MISTRAL = """{{- bos_token }}{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}"""
GEMMA = """{{- bos_token }}{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
INTERNLM = """{{- bos_token }}{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|User|>:' + message.content + '<eoh>\n' }}
    {%- else %}{{- '<|Bot|>:' + message.content + '<eoa>\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|Bot|>:' }}{%- endif %}"""
BAICHUAN = """{%- for message in messages %}
    {{- ('<reserved_106>' if message.role == 'user' else '<reserved_107>') + message.content }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<reserved_107>' }}{%- endif %}"""
GLM = """[gMASK]<sop>{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
PHI3 = """{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""


class Format(NamedTuple):
    """`ends` closes an answer of the own template, `named` one of FastChat's; `stops` end generated ones of both."""

    begin: str
    end: str
    others: tuple[str, ...]
    template: str | None
    ends: str
    named: str
    stops: tuple[str, ...]


IM = ("<|im_start|>", "<|im_end|>")
GLM_TOKENS = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>")
OF_QWEN = Format("<|endoftext|>", IM[1], IM[:1], QWEN, IM[1], IM[1], IM[1:])
OF_INTERNLM2 = Format("<s>", "</s>", IM, CHATML, IM[1], IM[1], ("</s>", IM[1]))
OF_GEMMA = Format(
    "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), GEMMA, "<end_of_turn>", "<eos>", ("<eos>", "<end_of_turn>")
)
OF_GLM = Format(
    "<sop>", "<|endoftext|>", GLM_TOKENS, GLM, "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>", "<|user|>")
)
OF_BASE = Format("<|endoftext|>", "<|endoftext|>", (), None, "", "<|endoftext|>", ("<|endoftext|>",))
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
RESERVED = ("<reserved_106>", "<reserved_107>")
FORMATS = {
    "llama": Format("<|begin_of_text|>", "<|eot_id|>", HEADERS, LLAMA3, "<|eot_id|>", "<|eot_id|>", ("<|eot_id|>",)),
    "mistral": Format("<s>", "</s>", (), MISTRAL, "</s>", "</s>", ("</s>",)),
    "mixtral": Format("<s>", "</s>", (), MISTRAL, "</s>", "</s>", ("</s>",)),
    "qwen2": OF_QWEN,
    "qwen2_moe": OF_QWEN,
    "qwen3": OF_QWEN,
    "qwen3_moe": OF_QWEN,
    "gemma": OF_GEMMA,
    "gemma2": OF_GEMMA,
    "internlm": Format("<s>", "</s>", ("<eoh>", "<eoa>"), INTERNLM, "<eoa>", "<eoa>", ("</s>", "<eoa>")),
    "internlm2": OF_INTERNLM2,
    "internlm3": OF_INTERNLM2,
    "baichuan": Format("<s>", "</s>", RESERVED, BAICHUAN, "</s>", "</s>", ("</s>", "<reserved_106>")),
    "chatglm": OF_GLM,
    "chatglm1": Format("<sop>", "<eop>", ("[gMASK]", "[MASK]"), None, "", "<eop>", ("<eop>",)),
    "glm": OF_GLM,
    "glm4": OF_GLM,
    "phi3": Format(
        "<s>",
        "<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        PHI3,
        "<|end|>",
        "<|endoftext|>",
        ("<|endoftext|>", "<|end|>"),
    ),
    "gpt2": OF_BASE,
    "gpt_neox": OF_BASE,
    "opt": Format("</s>", "</s>", ("<pad>",), None, "", "</s>", ("</s>",)),
    "bloom": Format("<s>", "</s>", ("<pad>",), None, "", "</s>", ("</s>",)),
    "falcon": OF_BASE,
    "mamba": OF_BASE,
    "mamba2": OF_BASE,
    "t5": Format("<pad>", "</s>", (), None, "", "</s>", ("</s>",)),
}
