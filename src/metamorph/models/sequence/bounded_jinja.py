"""Jinja for untrusted templates, bounded in time and memory, in any thread.

Transformers' sandbox keeps a template from files and Python objects, but not from nested loops, nor from strings that
double. Here every step of a loop, every call and every new value is charged to the budget of the rendering.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, cast

from jinja2 import Template, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template


BUDGET = 2_000_000  # steps and characters of a rendering, whatever the conversation
BUDGET_PER_CHARACTER = 100  # more of them for each character of the conversation
_MOST_AT_ONCE = 2**28  # most characters that one operation may produce before they are charged
_UNKNOWN = 100_000  # assumed length of an iterator: the longest `range`
_CALL = 50  # cost of a call or a filter, in steps
_METER = "metered"
_WIDE_FORMAT = re.compile(r"%[^A-Za-z%]*(\*|\d{5})|\{[^{}]*(\{|\d{5})")

_left: ContextVar[list[int]] = ContextVar("left")


def render(source: str, **values: Any) -> str:
    """Render a chat template in Transformers' dialect, with `messages`, `add_generation_prompt` and special tokens.

    A faulty one is a `TemplateError`, and one that takes more than the budget a `SecurityError`.
    """
    token = _left.set([BUDGET + BUDGET_PER_CHARACTER * _size(values)])
    try:
        return _compile(source).render(**values)
    finally:
        _left.reset(token)


def variables_of(source: str) -> frozenset[str]:
    """Names of variables that a chat template reads and does not set itself."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(source)))


@lru_cache(maxsize=64)
def _compile(source: str) -> Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> "_BoundedEnvironment":
    return _BoundedEnvironment(_compile_jinja_template("").environment)


class _Namespace(Namespace):
    """Its text is short, even if namespaces contain each other."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, theirs: Any) -> None:
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            optimized=False,  # or constants would be computed, uncharged, at compile time
            finalize=_metered,
        )
        self.filters = {name: _bounded(function) for name, function in theirs.filters.items()}
        self.filters[_METER] = _metered
        self.tests = theirs.tests
        self.globals = {**theirs.globals, "namespace": _Namespace}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Meters().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_growth(left, [right], all_count=True)
        elif operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
            _check_growth(left, [right], all_count=True)
        elif operator == "**" and _magnitude(left) * _magnitude(right) > _UNKNOWN:
            raise SecurityError("a power is too large")
        return _pay(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, LoopContext) and args:
            args = (_steps(args[0], _CALL), *args[1:])
        elif isinstance(owner := getattr(obj, "__self__", None), (str, bytes, int)):
            _check_growth(owner, [*args, *kwargs.values()], all_count=True)
        _take(_CALL)
        return _pay(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        _check_format(value.__self__)

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_growth(value.__self__, [*args, *kwargs.values()], all_count=True)
            return wrapped(*args, **kwargs)

        return formatted


class _Meters(NodeTransformer):
    """Charges everything that iterates, and everything that makes a value without a call or an operator."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        body = sum(1 for _ in node.find_all(nodes.Node))
        static = 1 + body + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self._meter(node.iter, nodes.Const(static))
        return node

    def visit_Made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return self._meter(node)

    visit_List = visit_Dict = visit_Concat = visit_Made

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_Made(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._meter(node, nodes.Const(0)) if isinstance(node.arg, nodes.Slice) else node

    @staticmethod
    def _meter(node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(cast("nodes.Expr", node), _METER, list(args), [], None, None, lineno=node.lineno)


@pass_context  # not at compile time
def _metered(_context: Any, value: Any, each: int | None = None) -> Any:
    """Charge for everything in a value; for its own length only (`each` 0); or for a loop over it."""
    if each is None:
        return _pay(value)
    if each == 0:
        _take(len(value) if isinstance(value, Sized) else 1)
        return value
    return _steps(value, each)


def _steps(values: Any, each: int) -> Any:
    if isinstance(values, Sized):
        _take(1 + each * len(values))
        return values
    return _counted(values, each)


def _counted(values: Iterable[Any], each: int) -> Iterator[Any]:
    for value in values:
        _take(each)
        yield value


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose results are charged."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0
    joins = function.__name__ in ("do_join", "sync_do_join")

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        value = args[place]
        if function.__name__ == "do_format":
            _check_format(str(value))
        _check_growth(value, [*args[place + 1 :], *kwargs.values()], all_count=joins or isinstance(value, str))
        _take(_CALL)
        return _pay(function(*args, **kwargs))

    return filtered


def _check_growth(value: Any, others: list[Any], all_count: bool) -> None:
    """Refuse an operation whose result could be as large as the product of its operands' sizes."""
    product = _magnitude(value) if isinstance(value, int) else _size(value)
    for other in others:
        if isinstance(other, int):
            product *= max(_magnitude(other), 1)
        elif all_count:
            product *= _size(other)
    _take(sum(len(each) for each in (value, *others) if isinstance(each, Sized) and not isinstance(each, str)))
    if product > _MOST_AT_ONCE:
        raise SecurityError("a text or list grows too large")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise SecurityError("a format is wider than 9999, or computes its width")


def _magnitude(value: Any) -> int:
    return min(abs(value), 2**63) if isinstance(value, int) else 1


def _pay(value: Any) -> Any:
    _take(1 + len(value) if isinstance(value, str) else _size(value))
    return value


def _take(amount: int) -> None:
    left = _left.get()
    left[0] -= amount
    if left[0] < 0:
        raise SecurityError(
            f"it takes more than {BUDGET} steps and characters, and {BUDGET_PER_CHARACTER} for each character of the "
            "conversation, which is the limit"
        )


def _size(value: Any) -> int:
    """Characters and elements in a value and, recursively, in its elements, up to what is left of the budget."""
    if isinstance(value, str):
        return 1 + len(value)
    total, waiting = 0, [value]
    left = _left.get([_MOST_AT_ONCE])[0]
    while waiting and total <= left:
        each = waiting.pop()
        total += 1
        if isinstance(each, (str, bytes)):
            total += len(each)
        elif isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting += each
        elif isinstance(each, int):
            total += each.bit_length() // 3
        elif isinstance(each, Iterator):
            total += _UNKNOWN
    return total
