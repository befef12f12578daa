"""A tokenizer's own chat template: Jinja as transformers renders it, in a sandbox with a budget."""

import json
from collections.abc import Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes

from msft.data.formats import BadRow, Turn
from msft.data.template_sandbox import Sandbox, narrow
from msft.errors import InputError


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: the template's own marks around what the assistant says."""

    tags = {"generation"}

    def __init__(self, environment):
        super().__init__(environment)
        self.blocks: list[str] | None = None
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        text = caller()
        if self.blocks is not None:
            start = sum(map(len, self.blocks))
            self.spans.append((start, start + len(text)))
        return text


class ChatTemplate:
    """A chat template of a tokenizer, `source`; `marks_answers` when it has `{% generation %}` blocks.

    Rendering raises BadRow with the template's own words when it refuses a conversation.
    """

    adds_prefix = False
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, source: str, named_tokens: dict[str, str], name: str = "chat"):
        self.name, self.source = name, source
        environment = _environment()
        self._budget = environment.budget
        self._generation = environment.extensions[Generation.identifier]
        self._named_tokens = dict(named_tokens)
        try:
            tree = environment.parse(source)
            self.marks_answers = any(_is_generation(block) for block in tree.find_all(jinja2.nodes.CallBlock))
            self._template = environment.compiled(tree)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"chat template {name!r} line {error.lineno}: {error.message}") from None
        except (RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise InputError(f"chat template {name!r}: cannot be compiled ({type(error).__name__})") from None

    def render(self, system: str | None, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Return the text of a conversation; `prompt` ends it with the opening of an answer."""
        return self.render_marked(system, turns, prompt)[0]

    def render_marked(
        self, system: str | None, turns: Sequence[Turn], prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and the [start, end) of each `{% generation %}` block in it."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [{"role": turn.role, "content": turn.text} for turn in turns]
        variables = {**self._named_tokens, "messages": messages, "tools": None, "documents": None}
        context = self._template.new_context({**variables, "add_generation_prompt": prompt})
        self._generation.blocks, self._generation.spans = [], []
        self._budget.start()
        try:
            for block in self._template.root_render_func(context):
                self._generation.blocks.append(block)
        except Exception as error:  # whatever a template does wrong is about this row
            raise BadRow(f"refused by the chat template: {str(error) or type(error).__name__}") from None
        return "".join(self._generation.blocks), self._generation.spans


def _is_generation(block: jinja2.nodes.CallBlock) -> bool:
    method = block.call.node
    return isinstance(method, jinja2.nodes.ExtensionAttribute) and method.identifier == Generation.identifier


def _environment() -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = narrow(_to_json)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
