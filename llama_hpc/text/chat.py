"""Chat templates: Jinja in a sandbox, with the names that templates written for ``transformers`` expect.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UsageError


class _Sandbox(ImmutableSandboxedEnvironment):
    """Forbidden attributes raise at once; Jinja's own sandbox would print them as empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str):
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is not allowed")


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str):
    raise TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which the models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled chat template. ``names`` are further variables it sees (``bos_token``, ``eos_token``)."""

    def __init__(self, template: str, source: str, names: dict[str, str]):
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        self._source = source
        self._names = names
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise UsageError(f"chat template of {source} is not valid Jinja: {_one_line(error)}") from error

    def render(self, messages: list[dict], add_generation_prompt: bool, now: datetime | None) -> str:
        """Text of ``messages``; raises UsageError with the text of whatever the template raises."""
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise UsageError('`messages` must be a list of objects such as {"role": "user", "content": "text"}')

        def strftime_now(pattern: str) -> str:
            return (now or datetime.now()).strftime(pattern)

        # A template is a program from the checkpoint: it may fail with any Python error on messages it does not expect.
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=strftime_now,
                **self._names,
            )
        except Exception as error:
            raise UsageError(f"chat template of {self._source}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, TemplateError):
        return text
    return f"{type(error).__name__}: {text}"
