"""Whether a chat template could tell a "|" in a text from the character that stands guard for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from jinja2 import nodes

# These make the same of texts that differ in one character, unless they are given it. `tojson` and `string` may spell
# the guard as an escape, which shows in the rendering.
_FILTERS = (
    *("count", "d", "default", "first", "float", "int", "items", "join", "last", "length", "list", "lower", "map"),
    *("reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "string", "tojson"),
    *("trim", "upper"),
)
_METHODS = (
    *("append", "count", "endswith", "find", "get", "index", "items", "keys", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("startswith", "strip", "upper", "values"),
)
_FUNCTIONS = ("dict", "namespace", "raise_exception", "range", "strftime_now")
_TOJSON_ARGUMENTS = ("indent", "separators")
_ORDERS = ("lt", "le", "gt", "ge", "lessthan", "greaterthan", "<", "<=", ">", ">=")  # tests that filters are given


def ignores_bars(tree: nodes.Template, barred: Collection[str]) -> bool:
    """Whether nothing that a parsed template does with a text depends on bars in it.

    `barred` are the variables given to it, such as special tokens, whose values hold bars. False also where it cannot
    be seen.
    """
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    written = {id(node) for output in tree.find_all(nodes.Output) for one in output.nodes for node in _written(one)}
    names = (name for name in tree.find_all(nodes.Name) if name.name in barred)
    constants = (one for one in tree.find_all(nodes.Const) if isinstance(one.value, str) and "|" in one.value)
    return (
        all(id(node) in written for node in (*names, *constants))
        and all(map(_is_blind_filter, tree.find_all(nodes.Filter)))
        and all(_is_blind_call(call, macros) for call in tree.find_all(nodes.Call))
        and all(map(_is_blind_comparison, tree.find_all(nodes.Compare)))
        and not any(test.args or test.kwargs for test in tree.find_all(nodes.Test))
    )


def is_constant(expression: nodes.Node) -> bool:
    """Whether an expression is a constant or a list of them."""
    items = expression.items if isinstance(expression, nodes.List | nodes.Tuple) else [expression]
    return all(isinstance(one, nodes.Const) for one in items)


def arguments(given: nodes.Call | nodes.Filter | nodes.Test) -> list[nodes.Node]:
    """What a call, a filter or a test is given beside what stands before it."""
    unpacked = [one for one in (given.dyn_args, given.dyn_kwargs) if one is not None]
    return [*given.args, *(one.value if isinstance(one, nodes.Keyword) else one for one in given.kwargs), *unpacked]


def _written(expression: nodes.Node) -> Iterator[nodes.Node]:
    """The parts of an expression that are written out as they are."""
    if isinstance(expression, nodes.Concat):
        parts: list[nodes.Expr] = expression.nodes
    elif isinstance(expression, nodes.Add):
        parts = [expression.left, expression.right]
    elif isinstance(expression, nodes.CondExpr):
        parts = [one for one in (expression.expr1, expression.expr2) if one is not None]
    else:
        yield expression
        return
    for part in parts:
        yield from _written(part)


def _is_blind_filter(applied: nodes.Filter) -> bool:
    if applied.name == "tojson":
        return not applied.args and all(one.key in _TOJSON_ARGUMENTS for one in applied.kwargs)
    given = arguments(applied)
    if applied.name not in _FILTERS or not all(isinstance(one, nodes.Const) for one in given):
        return False
    values = [one.value for one in given if isinstance(one, nodes.Const)]
    if applied.name == "map" and applied.args:
        return values[0] in _FILTERS and values[0] not in ("map", "tojson")
    return not any(value in _ORDERS for value in values)


def _is_blind_call(call: nodes.Call, macros: Collection[str]) -> bool:
    if isinstance(call.node, nodes.Getattr):
        return call.node.attr in _METHODS and (
            call.node.attr == "append" or all(isinstance(one, nodes.Const) for one in arguments(call))
        )
    return isinstance(call.node, nodes.Name) and (call.node.name in _FUNCTIONS or call.node.name in macros)


def _is_blind_comparison(compared: nodes.Compare) -> bool:
    """With a constant, which has no bar, or a number; what is written and what a text says may differ in bars."""
    operands = [compared.expr, *(operand.expr for operand in compared.ops)]
    if any(operand.op in ("lt", "lteq", "gt", "gteq") for operand in compared.ops):
        return any(map(_is_number, operands))
    return any(_is_number(one) or is_constant(one) for one in operands)


def _is_number(expression: nodes.Expr) -> bool:
    if isinstance(expression, nodes.Const):
        return isinstance(expression.value, int | float)
    if isinstance(expression, nodes.Filter):
        return expression.name in ("length", "count")
    return (
        isinstance(expression, nodes.Getattr)
        and isinstance(expression.node, nodes.Name)
        and expression.node.name == "loop"
    )
