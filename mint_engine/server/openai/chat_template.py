"""A conversation as the text its model was trained to see: the chat template of the model's tokenizer."""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.ext import Extension

from mint_engine.errors import UserError
from mint_engine.server.openai.chat_request import ChatRequest, Message
from mint_engine.server.openai.vocabulary import Vocabulary


def render_chat(request: ChatRequest, vocabulary: Vocabulary) -> str:
    """The prompt for the assistant's next turn, as a text that begins with the special tokens it needs.

    A control token that is spelled out in a message counts as that token, as it does in transformers.

    Raises:
        UserError: the model has no chat template, the template does not know `tools` or a variable of
            `chat_template_kwargs`, or it refuses the conversation (in its own words).
    """
    # With tool_choice "none" the model is to answer itself: it is not told of the tools.
    given = [] if request.tool_choice == "none" else request.tools or []
    tools: list[Any] | None = [tool.model_dump(exclude_none=True) for tool in given] or None
    variables = request.chat_template_kwargs or {}
    template = _template(vocabulary, tools)
    _check(template, tools is not None, variables, vocabulary)
    try:
        text = vocabulary.tokenizer.apply_chat_template(
            [_plain(message) for message in request.messages], tools=tools, chat_template=template,
            add_generation_prompt=True, tokenize=False, **variables,
        )  # fmt: skip
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"messages: the model's chat template refuses them: {error}") from error
    return str(text)


def _template(vocabulary: Vocabulary, tools: list[Any] | None) -> str:
    try:
        return str(vocabulary.tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise UserError("model: it has no chat template, so it cannot chat; use completions instead") from error


def _check(template: str, tools: bool, variables: dict[str, Any], vocabulary: Vocabulary) -> None:
    if not tools and not variables:
        return
    known = _variables(template)
    if tools and "tools" not in known:
        raise UserError("tools: the model's chat template has no place for tools, so the model would not see them")
    taken = {*inspect.signature(vocabulary.tokenizer.apply_chat_template).parameters, "messages"}
    for name in variables:
        if name in taken or name not in known:
            raise UserError(f"chat_template_kwargs: the model's chat template has no variable {name!r} to set")


@lru_cache(maxsize=64)
def _variables(template: str) -> frozenset[str]:
    """The variables a template reads."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError as error:
        raise UserError(f"model: its chat template cannot be read: {error}") from error


class _Generation(Extension):
    """transformers' own tag, around what the assistant says. Here it only has to be read."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: `system` for `developer`, arguments of calls as objects, nothing empty."""
    out = message.model_dump(exclude_none=True, exclude={"annotations"})
    out.setdefault("content", "")
    if message.role == "developer":
        out["role"] = "system"
    for call in out.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        try:
            call["function"]["arguments"] = json.loads(arguments) if arguments else {}
        except ValueError as error:
            raise UserError(f"messages: tool_calls: expected arguments in JSON, got {arguments!r:.60}") from error
    return out
