"""Chat templates in the manner of the families people use, written for the tests."""

from text_folders import CHATML

STYLES = {
    "chatml": CHATML,
    # A default system message when the conversation has none (SmolLM2, Qwen2).
    "default_system": "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}" + CHATML,
    # Llama 3: begin token, headers, trimmed words.
    "headers": """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '<|endoftext|>\n\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|endoftext|>\n\n' }}
{%- endif %}""",
    # Llama 2 and Mistral: no opening of its own, a space before and an end token after an answer, strict turns.
    "brackets": """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\n\n' %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set loop_messages = messages %}{%- endif %}
{%- for message in loop_messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}""",
    # Gemma: another name for the assistant, no system message.
    "renamed": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}""",
    # Qwen 3: empty thoughts before the last answer only.
    "thoughts": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if loop.last and message.role == 'assistant' %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    # DeepSeek R1: asking opens a thought that recorded answers do not have.
    "opened_thought": """{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{- '<|im_start|>' + message.content + eos_token }}
    {%- else %}{{- message.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|><think>\n' }}{%- endif %}""",
    # No end mark at all.
    "endless": """{%- for message in messages %}{{- message.role + ': ' + message.content + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}""",
    # Marks its answers itself.
    "marked": """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
    # What templates may use besides: loop controls, macros, namespaces, tojson, dates, undefined names.
    "everything": """{%- macro turn(message) %}{{ message.role | upper }}|{{ message | tojson }}|{% endmacro %}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {%- if message.content == 'stop' %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
  {{ turn(message) }}
    {%- if tools is defined and tools is not none %}TOOLS{% endif %}
{% endfor %}
{{ ns.count }} {{ strftime_now('%Y') }} {{ [1, 'é<'] | tojson(indent=2) }} {{ nothing }}{{ unk_token }}|{{ pad_token }}
{%- if not add_generation_prompt is defined %}UNDEFINED{% endif %}""",
}
