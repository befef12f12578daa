"""A chat template's loops and texts are bounded, and templates that keep to their budget render as in plain Jinja."""

import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from msft.data.chat_template import ChatTemplate
from msft.data.formats import BadRow, Turn
from msft.errors import InputError
from tests.faults.inputs import bounded

TURNS = [Turn("user", "hi\nthere"), Turn("assistant", "yes")]
DOUBLING = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
BIG = "{% set b = 'x' * 10**7 %}"

TOO_MUCH = [
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(10**12) %}x{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for a in [messages] recursive %}{{ loop([messages]) }}{{ loop([messages]) }}{% endfor %}",
    "{{ 'x' * 10**11 }}",
    "{{ 10**11 * 'x' }}",
    "{{ ['x'] * 10**11 }}",
    "{{ 'x'.encode() * 10**11 }}",
    "{{ (10**1000)**1000 }}",
    DOUBLING % ("'ab'", "ns.x + ns.x"),
    DOUBLING % ("'ab'", "ns.x ~ ns.x"),
    DOUBLING % ("[1]", "ns.x + ns.x"),
    DOUBLING % ("[1]", "[ns.x, ns.x]"),
    DOUBLING % ("[1]", "{1: ns.x, 2: ns.x}"),
    DOUBLING % ("3", "ns.x * ns.x"),
    "{% macro f(x) %}{{ f(x + x) }}{% endmacro %}{{ f('ab') }}",
    BIG + "{% for i in range(99999) %}{{ b }}{% endfor %}",
    BIG + "{% set c %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}",
    BIG + "{{ [b, b, b] }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6) | replace('', 'b' * 10**6) }}",
    "{{ (['a' * 1000] * 1000) | join('x' * 10**6) }}",
    "{{ ('x' * 10**6).join(['a'] * 10**5) }}",
    "{{ 'a'.translate({97: 'b'}) }}",
    "{{ 'x' | center(10**11) }}",
    "{{ 'x' | center(width=10**11) }}",
    "{{ 'x' | center(*[10**11]) }}",
    "{{ ['x'] | map('center', 10**11) | list }}",
    "{% filter center(10**11) %}x{% endfilter %}",
    "{% set x | center(10**11) %}x{% endset %}",
    "{{ [1] | batch(10**11, 'x') | list }}",
    "{{ [1] | slice(10**11) | list }}",
    "{{ messages | tojson(indent=10**11) }}",
    "{{ 'x\nx' | indent(10**11) }}",
    "{{ 'x'.center(10**11) }}",
    "{{ 'x'.ljust(width=10**11) }}",
    "{{ '\t'.expandtabs(10**11) }}",
    "{{ (1).to_bytes(10**11, 'big') }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (10**11, 1) }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10**11) }}",
    "{{ lipsum(10**9) }}",
]


@pytest.mark.parametrize("source", TOO_MUCH)
def test_too_much_is_refused_soon(source):
    template = ChatTemplate(source, {})
    with bounded(), pytest.raises(BadRow, match="refused by the chat template: .+"):
        template.render(None, TURNS)


@pytest.mark.parametrize(
    "source", ["{% if 1 %}" * 200 + "{% endif %}" * 200, "{{ 1" + "+1" * 9000 + " }}", "{{ " + "(" * 9000]
)
def test_what_cannot_be_compiled_is_named(source):
    with bounded(), pytest.raises(InputError, match="chat template 'chat'"):
        ChatTemplate(source, {})


SOUND = [
    "{% for m in messages %}{{ loop.index }}{{ '<|' + m['role'] + '|>' ~ m.content | trim }}{% endfor %}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{% set a, b = (1, 2) %}{{ a + b }}",
    "{% macro say(text, end='!') %}{{ text }}{{ caller() if caller }}{{ end }}{% endmacro %}{{ say('a') }}"
    "{% call say('b') %}c{% endcall %}",
    "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text ~ m.content %}{% endfor %}{{ ns.n }}{{ ns.text }}",
    "{{ messages | map(attribute='content') | join('; ') }}{{ ['a', 1] | join }}{{ 'aXX' | replace('X', '-', 1) }}",
    "{{ messages | join(', ', attribute='role') }}{{ '%s is %d' | format('x', 3) }}{{ '%s' % 'y' }}",
    "{{ '{:>4}'.format(7) }}{{ '{a}'.format(a=1) }}{{ '-'.join(['a', 'b']) }}{{ 'ab'.replace('b', 'c') }}",
    "{{ 'a\nb' | indent(2) }}{{ 'x' | center(9) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ {'k': [1, (2, 3)]} }}",
    "{% filter upper %}a{{ messages[0].content }}{% endfilter %}{% set x | lower %}ABC{% endset %}{{ x }}",
    "{% for m in messages if m.role == 'user' %}{{ m.content.split('\n')[0] }}{% else %}none{% endfor %}",
    "{{ a is defined }}{{ a }}{{ messages[-1]['content'][::-1] }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ 3 * 'ab' }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
]


@pytest.mark.parametrize("source", SOUND)
def test_sound_templates_render_as_in_plain_jinja(source):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    messages = [{"role": turn.role, "content": turn.text} for turn in TURNS]
    expected = plain.from_string(source).render(messages=messages)
    template = ChatTemplate(source, {})
    assert template.render(None, TURNS) == expected
    assert template.render(None, TURNS) == expected  # the budget is a rendering's own


def test_long_conversations_keep_to_the_budget():
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content.strip() | trim + '\n' }}{% endfor %}"
    turns = [Turn(("user", "assistant")[number % 2], "word " * 2000) for number in range(200)]
    assert len(ChatTemplate(source, {}).render(None, turns)) > 1_900_000
