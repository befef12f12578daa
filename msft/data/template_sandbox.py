"""The sandbox that a tokenizer's chat template runs in: out of Python's reach, and with a budget.

A template comes with a model from anywhere. Jinja's sandbox keeps it from Python's insides, but not from looping for
ever or from making terabytes of text: so loops, macros, and whatever makes text are counted.
"""

import functools
import re

import jinja2
import jinja2.filters
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 1 << 20  # one for each turn of a loop, each call, and each 128 characters that are made: seconds at most
LARGEST = 1 << 24  # characters of a text, entries of a list
LARGEST_WIDTH = 1 << 10
LARGEST_BITS = 1 << 12

SIZED = "counted by the budget"  # a filter's name that no template can write
_CONTAINERS = list | tuple | dict | Namespace
_WIDENING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes")
_WIDENING_FILTERS = ("center", "indent", "batch", "slice")
_LONG_FORMAT = re.compile(r"[%{][^}a-zA-Z]*(\*|\d{4})")


class TooMuch(jinja2.TemplateError):
    """A template that goes beyond its budget."""


class Budget:
    """Counts what a template does; two filters, put into its syntax tree, call it."""

    def __init__(self):
        self._left = STEPS

    def start(self) -> None:
        """Give the next rendering its whole budget."""
        self._left = STEPS

    def reserve(self, size: int) -> None:
        """Raise TooMuch for `size` characters that are too many at once; take them from the budget."""
        if size > LARGEST:
            raise TooMuch(f"it makes a text or a list of {size} elements")
        self._left -= 1 + size // 128
        if self._left < 0:
            raise TooMuch("it takes too many steps or makes too much text")

    def sized(self, value):
        """Return a value as it is, its size as a text taken from the budget."""
        self.reserve(self.size(value))
        return value

    def size(self, value) -> int:
        """Return about how long a value's text is; raises TooMuch as soon as it is too long."""
        if isinstance(value, str | bytes):
            return len(value)
        total, waiting = 0, [value] if isinstance(value, _CONTAINERS) else []
        while waiting:
            inner = waiting.pop()
            for item in _items(inner):
                total += 8 + (len(item) if isinstance(item, str | bytes) else 0)
                if isinstance(item, _CONTAINERS):
                    waiting.append(item)
            if total > LARGEST:
                raise TooMuch("it makes too large a list")
        return total


def _items(container):
    if isinstance(container, Namespace):
        return container._Namespace__attrs.values()
    return (*container.keys(), *container.values()) if isinstance(container, dict) else container


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a `Budget`; `compiled` makes a template that keeps to it."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **settings):
        super().__init__(**settings)
        self.budget = budget = Budget()

        # A filter that takes the context is not folded into a constant.
        @jinja2.pass_context
        def sized(_context, value):
            return budget.sized(value)

        self.filters[SIZED] = sized
        del self.globals["lipsum"]
        for name in _WIDENING_FILTERS:
            self.filters[name] = narrow(self.filters[name])
        self.filters |= {"join": self._join, "replace": self._replace, "format": self._format}

    def compiled(self, tree: jinja2.nodes.Template) -> jinja2.Template:
        """Compile a template's syntax tree, which is changed."""
        self.budget.start()  # constants are folded while compiling
        return self.from_string(_Counting().visit(tree))

    def call_binop(self, context, operator: str, left, right):
        """Carry out an operator; one whose result would be far larger than its operands is refused before."""
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | _CONTAINERS) and isinstance(times, int):
                    self.budget.reserve(self.budget.size(text) * max(times, 0))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LARGEST_BITS:
                raise TooMuch(f"it makes a number of {bits} bits")
        if operator == "%" and isinstance(left, str | bytes):
            _check_format(str(left))
        return self.budget.sized(super().call_binop(context, operator, left, right))

    def call(self, context, function, /, *args, **kwargs):
        """Call a function or method of the template; methods that make text are checked before."""
        # Jinja wraps str.format.
        method = getattr(function, "__wrapped__", function)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int):
            if name in _WIDENING_METHODS:
                _check_widths(*args, *kwargs.values())
            elif name == "replace" and len(args) > 1:
                self._reserve_replaced(owner, *args[:2])
            elif name == "join" and args:
                args = (list(args[0]),)
                self._reserve_joined(owner, args[0])
            elif name in ("format", "format_map"):
                _check_format(owner)
                _check_widths(*args, *kwargs.values())
            elif name == "translate":
                raise TooMuch("it calls translate, which is not allowed")
        return self.budget.sized(super().call(context, function, *args, **kwargs))

    def _reserve_replaced(self, text, old, new) -> None:
        self.budget.reserve(len(text) + text.count(old) * len(new))

    def _reserve_joined(self, separator, values: list) -> None:
        self.budget.reserve(sum(map(len, values)) + len(separator) * len(values))

    def _replace(self, value, old, new, count=None) -> str:
        text, old, new = str(value), str(old), str(new)
        self._reserve_replaced(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, value, d="", attribute=None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        values = [str(item) for item in value]
        self._reserve_joined(d, values)
        return d.join(values)

    def _format(self, value, *args, **kwargs) -> str:
        _check_format(str(value))
        return jinja2.filters.do_format(value, *args, **kwargs)


def narrow(function):
    """Return a filter that refuses numbers beyond any sensible width among its arguments."""

    @functools.wraps(function)
    def checked(value, *args, **kwargs):
        _check_widths(*args, *kwargs.values())
        return function(value, *args, **kwargs)

    return checked


def _check_widths(*numbers) -> None:
    for number in numbers:
        if isinstance(number, int) and abs(number) > LARGEST_WIDTH:
            raise TooMuch(f"it asks for a width of {number:.3g}")


def _check_format(text: str) -> None:
    if _LONG_FORMAT.search(text):
        raise TooMuch("it asks for a width of more than three digits")


class _Counting(NodeTransformer):
    """Puts calls of the budget into a template's syntax tree."""

    def _stepping(self, node):
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(_counted(jinja2.nodes.Const(None)), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _stepping

    def _sized(self, node):
        return _counted(self.generic_visit(node))

    visit_Concat = visit_Add = visit_List = visit_Dict = _sized

    def visit_Tuple(self, node):
        # Others are the names that a loop or an assignment sets.
        return self._sized(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Filter(self, node):
        # The filter of a block has no node of its own, or one that has none.
        innermost = node
        while isinstance(innermost, jinja2.nodes.Filter):
            innermost = innermost.node
        return self.generic_visit(node) if innermost is None else self._sized(node)

    def visit_Output(self, node):
        self.generic_visit(node)
        node.nodes = [item if isinstance(item, jinja2.nodes.TemplateData) else _counted(item) for item in node.nodes]
        return node


def _counted(node):
    if isinstance(node, jinja2.nodes.Filter) and node.name == SIZED:
        return node
    return jinja2.nodes.Filter(node, SIZED, [], [], None, None, lineno=node.lineno)
