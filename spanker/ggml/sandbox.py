# SPDX-License-Identifier: Apache-2.0
"""Runs a chat template, which is a program by whoever made the model file.

It runs in Jinja's sandbox, with limits on its steps, values and output: a
careless template cannot hang or flood the process, though a determined one can
still waste memory.  The environment (options, functions) is the one that
Hugging Face's transformers gives to chat templates.  What the template is
given does not live here.

This is imported when the first template is compiled: most programs have none,
and Jinja takes longer to import than a model's tokenizer to build.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from spanker.errors import TemplateError

MAX_OUTPUT_CHARS = 1 << 23
#: Loop iterations, macro calls and operations in one rendering.
MAX_STEPS = 200_000
#: This many characters or items of a computed value count as one more step.
STEP_SIZE = 256
#: Characters or items of a value that the template computes.
MAX_VALUE_SIZE = 1 << 23
MAX_INTEGER_BITS = 4096
#: Numbers passed to methods such as str.ljust.
MAX_ARGUMENT = 1 << 16

_STEP_FILTER = "spanker step"
_BUDGET = "spanker budget"


class SandboxedTemplate:
    """A compiled template.

    Raises `TemplateError` (one line) for a source that does not compile, and
    from `render` for one that fails or exceeds a limit.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        try:
            tree = _Instrument().visit(environment.parse(source))
            self._template = environment.from_string(tree)
        except Exception as error:  # jinja2 errors, RecursionError, ...
            raise TemplateError(f"the chat template is invalid: {_line(error)}") from None

    def render(self, variables: Mapping[str, object]) -> str:
        """What the template writes, given these variables."""
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate({**variables, _BUDGET: _Budget()}):
                size += len(piece)
                if size > MAX_OUTPUT_CHARS:
                    _refuse(f"writes more than {MAX_OUTPUT_CHARS} characters")
                pieces.append(piece)
        except TemplateError:
            raise
        except Exception as error:  # whatever an expression in the template may raise
            raise TemplateError(f"the chat template failed: {_line(error)}") from None
        return "".join(pieces)


class _Budget:
    """Steps left in one rendering."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = MAX_STEPS

    def spend(self, size: int = 0) -> None:
        """Count one step that makes a value of `size`."""
        if size > MAX_VALUE_SIZE:
            _refuse(f"computes a value larger than {MAX_VALUE_SIZE}")
        self.steps -= 1 + size // STEP_SIZE
        if self.steps < 0:
            _refuse(f"takes more than {MAX_STEPS} steps")


class _Instrument(NodeTransformer):
    """Makes every loop iteration and macro call count a step, and `~` a checked `+`.

    Jinja's sandbox bounds one range(), not loops in loops; and its hook for
    operators does not see `~`.
    """

    def _count(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        # A filter, because a template cannot put another in its place.
        step = nodes.Filter(nodes.Const(None), _STEP_FILTER, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.Filter(node.test, _STEP_FILTER, [], [], None, None)
        return node

    visit_For = visit_Macro = visit_CallBlock = _count

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        joined: nodes.Expr | None = None
        for part in node.nodes:
            text = nodes.Filter(part, "string", [], [], None, None)
            joined = text if joined is None else nodes.Add(joined, text)
        assert joined is not None
        return joined.set_lineno(node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Those that can make a huge value out of a number; no chat template needs them.
        for name in ("center", "format", "indent", "wordwrap"):
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = _tojson
        self.filters[_STEP_FILTER] = _step
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    # str.format: a width in its pattern makes a huge value, too.  Jinja 3.1.5 and
    # later ask wrap_str_format for it, earlier ones is_safe_attribute.

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            _refuse("calls str.format, which is not supported")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in ("format", "format_map"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        _budget(context).spend(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(
        __self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if __obj is not __self.globals["range"]:  # which has its own limit
            for value in (*args, *kwargs.values()):
                if isinstance(value, int) and abs(value) > MAX_ARGUMENT:
                    _refuse(f"calls a function with {value}, at most {MAX_ARGUMENT} is allowed")
        result = super().call(__context, __obj, *args, **kwargs)
        _budget(__context).spend(_size(result))
        return result


def _result_size(operator: str, left: Any, right: Any) -> int:
    """How large `left operator right` will be, at most."""
    if isinstance(left, int) and isinstance(right, int):
        a, b = left.bit_length(), right.bit_length()
        bits = a * max(right, 1) if operator == "**" else a + b
        if bits > MAX_INTEGER_BITS:
            _refuse(f"computes an integer of more than {MAX_INTEGER_BITS} bits")
        return 0
    if isinstance(left, str) and operator == "%":
        _refuse("formats with %, which is not supported")
    if operator == "*":
        if isinstance(right, int):
            return _size(left) * right
        return _size(right) * left if isinstance(left, int) else 0
    return _size(left) + _size(right)


def _size(value: object) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _budget(context: jinja2.runtime.Context) -> _Budget:
    # `parent` holds what render() passed; a template's own variables hide nothing there.
    budget = context.parent[_BUDGET]
    assert isinstance(budget, _Budget)
    return budget


@jinja2.pass_context
def _step(context: jinja2.runtime.Context, value: Any) -> Any:
    _budget(context).spend()
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and not 0 <= indent <= 64:
        _refuse(f"calls tojson with indent {indent}, expected 0..64")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object = "") -> NoReturn:
    raise TemplateError(f"the chat template refuses the messages: {_line(message)}")


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(f"the chat template {reason}; the model file's template is at fault")


def _line(error: object) -> str:
    """An error's text on one line, bounded, with the template line where known."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if line else text
