"""What a chat template makes depend on a dialogue's particulars: words that it looks for, numbers that it counts to.

Probes of a few plain messages cannot show what such a template writes where a text has the word, or where a dialogue is
that long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import nodes

from qwentune.data.templates.bars import arguments, is_constant

_COUNTED = (0, 1)  # the first, the last, the one before: the probes have these
_THINK_TAGS = ("<think>", "</think>")  # what a template makes of these, the probes show
_TEXT_METHODS = (
    *("count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex"),
    *("rpartition", "rsplit", "split", "startswith", "strip", "lstrip", "rstrip"),
)
_COMPARING_FILTERS = ("replace", "select", "reject", "selectattr", "rejectattr")


@dataclass(frozen=True, slots=True)
class Particulars:
    """Words that a template looks for: `within` a text, or as a `whole` one (roles and types are among these)."""

    within: frozenset[str]
    whole: frozenset[str]
    ignores_case: bool = False

    def occur_in(self, lines: str) -> bool:
        """Whether one of the words stands in texts that are given one a line."""
        lines = f"\n{lines.lower() if self.ignores_case else lines}\n"
        return any(word in lines for word in self.within) or any(f"\n{word}\n" in lines for word in self.whole)


def particulars(tree: nodes.Template) -> Particulars | None:
    """The words that a parsed template looks for.

    None where it counts further than to one or by a choice, or compares two things that a dialogue brings.
    """
    named = {id(keyword.value) for keyword in tree.find_all(nodes.Keyword)}  # such as an indentation
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, int | float) and constant.value not in _COUNTED and id(constant) not in named:
            return None
    for applied in tree.find_all(nodes.Filter):
        if applied.name in ("length", "count") and isinstance(applied.node, nodes.Filter):  # some of the messages
            return None
    if not all(map(_compares_with_known, tree.find_all(nodes.Compare))):
        return None
    if any(map(_looks_for_unknown, tree.find_all((nodes.Call, nodes.Filter, nodes.Test)))):
        return None
    applied = {applied.name for applied in tree.find_all(nodes.Filter)}
    applied |= {call.node.attr for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Getattr)}
    within, whole = {*_within(tree), *_compared(tree, as_given=False)}, {*_compared(tree, as_given=True)}
    if applied & {"lower", "upper", "capitalize", "title"}:
        return Particulars(frozenset(map(str.lower, within)), frozenset(map(str.lower, whole)), ignores_case=True)
    return Particulars(frozenset(within), frozenset(whole))


def _compares_with_known(compared: nodes.Compare) -> bool:
    """Whether a side of the comparison is a constant, or says at which message a loop is."""
    operands = [compared.expr, *(operand.expr for operand in compared.ops)]
    return any(is_constant(one) or _is_of_loop(one) for one in operands)


def _looks_for_unknown(applied: nodes.Call | nodes.Filter | nodes.Test) -> bool:
    """Whether something else than constants is looked for in a text, or compared with one."""
    if isinstance(applied, nodes.Call):
        attribute = applied.node.attr if isinstance(applied.node, nodes.Getattr) else ""
        if attribute == "changed":  # of a loop
            return True
        compares = attribute in _TEXT_METHODS
    else:
        compares = isinstance(applied, nodes.Test) or applied.name in _COMPARING_FILTERS
    return compares and not all(map(is_constant, arguments(applied)))


def _is_of_loop(expression: nodes.Expr) -> bool:
    return isinstance(expression, nodes.Getattr) and _names(expression.node) == {"loop"}


def _within(tree: nodes.Template) -> Iterator[str]:
    """The words that the template looks for inside texts."""
    items = {name for loop in tree.find_all(nodes.For) for name in _names(loop.target)}
    assigned = [(_names(one.target), one.node) for one in tree.find_all(nodes.Assign)]
    sought = [
        compared.expr
        for compared in tree.find_all(nodes.Compare)
        # A word sought in the item of a loop is a key of a message or a part.
        if compared.ops[0].op in ("in", "notin") and not (_names(compared.ops[0].expr) & items)
    ]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _TEXT_METHODS:
            sought += call.args
    for applied in tree.find_all(nodes.Filter):
        if applied.name == "replace":
            sought += applied.args
    for expression in sought:
        yield from _words(expression)
        for names, value in assigned:
            if names & _names(expression):
                yield from _words(value)


def _compared(tree: nodes.Template, *, as_given: bool) -> Iterator[str]:
    """The words compared with a field or a variable as it is given, or with what is made of one, such as its end."""
    for compared in tree.find_all(nodes.Compare):
        operands = [compared.expr, *(operand.expr for operand in compared.ops)]
        if compared.ops[0].op in ("in", "notin") and not isinstance(operands[1], nodes.List | nodes.Tuple):
            continue  # sought within it
        words = [
            word
            for operand in operands
            for one in (operand.items if isinstance(operand, nodes.List | nodes.Tuple) else [operand])
            for word in _words(one)
        ]
        if as_given is not any(map(_is_made, operands)):
            yield from words


def _is_made(expression: nodes.Expr) -> bool:
    if isinstance(expression, nodes.Getitem):
        return not (isinstance(expression.arg, nodes.Const) and isinstance(expression.arg.value, str))
    return isinstance(expression, nodes.Filter | nodes.Call | nodes.BinExpr | nodes.Concat)


def _words(expression: nodes.Node) -> Iterator[str]:
    if isinstance(expression, nodes.Const) and isinstance(expression.value, str):
        word: str = expression.value
        if word.strip() and word not in _THINK_TAGS:
            yield word


def _names(expression: nodes.Node) -> set[str]:
    """The variable that an expression is, or the variables that a target sets."""
    names = expression.items if isinstance(expression, nodes.Tuple) else [expression]
    return {name.name for name in names if isinstance(name, nodes.Name | nodes.NSRef)}
