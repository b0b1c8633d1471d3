"""transformers' sandbox for chat templates, with bounds on what a template may use and quicker at looking fields up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from types import BuiltinMethodType, FunctionType
from typing import Any, cast

import jinja2
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, operators
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]
    render_jinja_template,  # pyright: ignore[reportUnknownVariableType]
)

from qwentune.data.templates import bounds
from qwentune.data.templates.bars import is_constant
from qwentune.data.templates.bounds import GROWING_METHODS, LARGE, BoundError, Meter

LONGEST_TEMPLATE = 2**16  # characters; Qwen's longest has a fifth of them
_MOST_TERMS = 8  # of a sum that is written out, and so no part of anything that grows
_DICT_ATTRIBUTES = frozenset(dir(dict))
_ITERATED = " iterated"  # a filter that no template can name

# Of the template's own `raise_exception`, of operations that its values do not take, of Python, which takes no more
# than so many loops within loops, and of the sandbox's bounds.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    NameError,
    BufferError,
    StopIteration,
)


def rendered(template: str, **arguments: Any) -> list[str]:
    """What `apply_chat_template` renders with these arguments; raises one of TEMPLATE_ERRORS."""
    _compiled(template)[1].begin()
    return list(_render(chat_template=template, **arguments)[0])


def parsed(template: str) -> nodes.Template:
    """The syntax tree of a chat template."""
    return _compiled(template)[0].environment.parse(template)


@lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[jinja2.Template, Meter]:
    """The template as transformers compiles it but for the bounds, and what counts its use."""
    if len(template) > LONGEST_TEMPLATE:
        raise BoundError(f"it is a text of {len(template)} characters, more than {LONGEST_TEMPLATE}")
    environment, meter = _environment(), Meter()
    environment.is_safe_attribute = _remembering(environment.is_safe_attribute)
    environment.getattr = _look_up(environment)
    for name in ("built", "compared", "joined", "made", "text"):
        setattr(environment, f"bounded_{name}", getattr(meter, name))
    environment.concat = _joined
    environment.intercepted_binops = frozenset(("+", "*", "**", "%"))
    environment.call_binop = _operate(environment, meter)
    environment.call = _call(environment, meter)
    environment.filters = {name: meter.bounded_filter(name, one) for name, one in environment.filters.items()}
    environment.filters[_ITERATED] = _iterate(meter)
    environment.tests = {name: meter.bounded_test(name, one) for name, one in environment.tests.items()}
    environment.code_generator_class = _Code
    return environment.from_string(template), meter


def _compiled_template(template: str) -> jinja2.Template:
    return _compiled(template)[0]


def _environment() -> Any:
    """The environment in which transformers renders templates: a new one, in which none is compiled yet."""
    return cast(Any, _compile_jinja_template).__wrapped__("").environment


# The function that `apply_chat_template` runs, which compiles by ours: theirs would compute, before any bound is set,
# what can be computed of a template's constants.
_render = cast(
    Any,
    FunctionType(
        cast(Any, render_jinja_template).__code__,
        {**cast(Any, render_jinja_template).__globals__, "_compile_jinja_template": _compiled_template},
        "render_jinja_template",
        cast(Any, render_jinja_template).__defaults__,
    ),
)


class _Code(CodeGenerator):
    """Jinja's code, in which whatever may grow goes through the meter."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        outputs = [child for output in node.find_all(nodes.Output) for child in output.nodes]
        self.written = {id(one) for child in outputs for one in _sums(child)}
        for loop in list(node.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _ITERATED, [], [], None, None, lineno=loop.lineno)
            loop.iter.environment = self.environment
        super().visit_Template(node, frame)

    def visit_Add(self, node: nodes.Add, frame: Any) -> None:
        if id(node) not in self.written:
            super().visit_Add(node, frame)
            return
        self.write("(")
        self._within("", node.left, frame)
        self._within(" + ", node.right, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        is_marked = frame.eval_ctx.volatile or frame.eval_ctx.autoescape
        self.write("environment.bounded_made(markup_join((" if is_marked else "environment.bounded_joined((")
        for one in node.nodes:
            self._within("environment.bounded_text" if is_marked else "", one, frame)
            self.write(", ")
        self.write(")))" if is_marked else "))")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        operands = [node.expr, *(one.expr for one in node.ops)]
        if len(operands) == 2 and any(is_constant(one) or _is_number(one) for one in operands):
            super().visit_Compare(node, frame)
            return
        self.write("(")
        self._within("environment.bounded_compared", node.expr, frame)
        for one in node.ops:
            self._within(f" {operators[one.op]} environment.bounded_compared", one.expr, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._built(super().visit_List, node, node.items, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        self._built(super().visit_Tuple, node, node.items if node.ctx == "load" else [], frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._built(super().visit_Dict, node, [pair.value for pair in node.items], frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.bounded_made(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def _built(self, visit: Callable[[Any, Any], None], node: Any, items: Iterable[nodes.Expr], frame: Any) -> None:
        may_nest = not all(map(is_constant, items))
        self.write("environment.bounded_built(" if may_nest else "")
        visit(node, frame)
        self.write(")" if may_nest else "")

    def _output_child_pre(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
            self.write("environment.bounded_text(")
        else:
            self.write("(" if _is_text(node) else "(written if type(written := (")

    def _output_child_post(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            self.write("))")
        else:
            self.write(")" if _is_text(node) else ")) is str else environment.bounded_text(written))")

    def _within(self, before: str, node: nodes.Expr, frame: Any) -> None:
        self.write(f"{before}(")
        self.visit(node, frame)
        self.write(")")


def _sums(expression: nodes.Node) -> list[nodes.Add]:
    """The sums of a few terms that are written out as they are."""
    if isinstance(expression, nodes.Add):
        sums, rest = list[nodes.Add](), [expression]
        while rest and len(sums) < _MOST_TERMS:
            sums.append(rest.pop())
            rest += [one for one in (sums[-1].left, sums[-1].right) if isinstance(one, nodes.Add)]
        return [] if rest else sums
    return []


def _is_number(expression: nodes.Expr) -> bool:
    """Whether it can be seen that an expression is a number: what a loop says of itself, or a difference."""
    if isinstance(expression, nodes.Getattr):
        return isinstance(expression.node, nodes.Name) and expression.node.name == "loop"
    return isinstance(expression, nodes.Sub)


def _is_text(expression: nodes.Expr) -> bool:
    """Whether it can be seen that an expression is a text."""
    if isinstance(expression, nodes.Add):
        return _is_text(expression.left) or _is_text(expression.right)
    return isinstance(expression, nodes.Concat) or (
        isinstance(expression, nodes.Const) and isinstance(expression.value, str)
    )


def _iterate(meter: Meter) -> Callable[[Context, Iterable[Any]], Iterable[Any]]:
    """The items of a loop, each counted; with a context, so that none is made when the template is compiled."""

    @pass_context
    def iterated(_: Context, items: Iterable[Any]) -> Iterable[Any]:
        return meter.iterated(items)

    return iterated


def _operate(environment: Any, meter: Meter) -> Callable[[object, str, Any, Any], Any]:
    """What the sandbox makes of a binary operator."""
    operations = environment.binop_table

    def call_binop(_: object, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:
            return meter.made(left + right)
        return meter.combined(operator, left, right, operations[operator])

    return call_binop


def _call(environment: Any, meter: Meter) -> Callable[..., Any]:
    """What the sandbox makes of a call."""
    is_safe_callable = environment.is_safe_callable

    def call(context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        if type(called) is BuiltinMethodType and called.__name__ not in GROWING_METHODS:  # such as `strip`
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            result = called(*args, **kwargs)
            meter.left -= 1
            return result if type(result) is str and len(result) < LARGE else meter.made(result)
        if not is_safe_callable(called):
            raise SecurityError(f"{called!r} is not safely callable")
        if isinstance(called, LoopContext) and args:
            args = (meter.iterated(args[0]), *args[1:])
        result = context.call(called, *meter.before_call(called, args, kwargs), **kwargs)
        return meter.made(result) if type(result) in (str, list) else result

    return call


def _joined(pieces: Iterable[str]) -> str:
    """What Jinja joins a rendering with, but for its bound."""
    parts, size, longest = list[str](), 0, bounds.LONGEST_TEXT
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size > longest:
            bounds.bound(size)
    return "".join(parts)


def _remembering(is_safe: Callable[[object, str, object], bool]) -> Callable[[object, str, object], bool]:
    """The sandbox's judgement of an attribute, asked once for each type and name: it looks at nothing else."""
    known: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(obj: object, attr: str, value: object) -> bool:
        key = type(obj), attr
        if key not in known:
            known[key] = is_safe(obj, attr, value)
        return known[key]

    return is_safe_attribute


def _look_up(environment: jinja2.Environment) -> Callable[[Any, str], Any]:
    """The sandbox's look-up, without its try for an attribute where a dict can only have a key."""
    undefined, look_up_any = environment.undefined, environment.getattr

    def look_up(obj: Any, attribute: str) -> Any:
        if type(obj) is not dict or attribute in _DICT_ATTRIBUTES:
            return look_up_any(obj, attribute)
        fields = cast(dict[str, Any], obj)
        return fields[attribute] if attribute in fields else undefined(obj=fields, name=attribute)

    return look_up
