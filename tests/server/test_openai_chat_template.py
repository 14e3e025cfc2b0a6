"""Conversations through the chat template of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai_fakes import byte_tokenizer

from mint_engine.errors import UserError
from mint_engine.server.openai.chat_request import ChatRequest
from mint_engine.server.openai.chat_template import render_chat
from mint_engine.server.openai.vocabulary import Vocabulary

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
WITH_TOOLS = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% if thinking is defined and not thinking %}(silent){% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
    "{% generation %};{% endgeneration %}{% endfor %}"
)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    return Vocabulary(byte_tokenizer(tmp_path))


def rendered(vocabulary: Vocabulary, *messages: dict[str, Any], **fields: Any) -> str:
    return render_chat(ChatRequest(model="m", messages=list(messages), **fields), vocabulary)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_the_template_of_the_model_is_used(vocabulary: Vocabulary):
    assert rendered(vocabulary, user("hi")) == "<user>hi\n<assistant>"


def test_a_developer_is_the_system(vocabulary: Vocabulary):
    assert rendered(vocabulary, {"role": "developer", "content": "be"}, user("x")).startswith("<system>be\n<user>x")


def test_no_template_no_chat(vocabulary: Vocabulary):
    vocabulary.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        rendered(vocabulary, user("hi"))


def test_tools_are_refused_where_the_model_would_not_see_them(vocabulary: Vocabulary):
    with pytest.raises(UserError, match="no place for tools"):
        rendered(vocabulary, user("hi"), tools=[TOOL])


def test_tools_reach_a_template_that_knows_them(vocabulary: Vocabulary):
    vocabulary.tokenizer.chat_template = WITH_TOOLS
    assert rendered(vocabulary, user("hi"), tools=[TOOL]) == "[add]user:hi;"
    assert rendered(vocabulary, user("hi"), tools=[TOOL], tool_choice="none") == "user:hi;"


def test_calls_are_given_to_the_template_as_objects(vocabulary: Vocabulary):
    vocabulary.tokenizer.chat_template = WITH_TOOLS
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    answered = {"role": "tool", "tool_call_id": "1", "content": "2"}
    said = rendered(vocabulary, user("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}, answered)
    assert said == 'user:hi;assistant:<add {"a": 1}>;tool:2;'


def test_variables_of_the_template(vocabulary: Vocabulary):
    vocabulary.tokenizer.chat_template = WITH_TOOLS
    assert rendered(vocabulary, user("hi"), chat_template_kwargs={"thinking": False}) == "(silent)user:hi;"
    for name in ("no_such", "messages", "chat_template", "tools", "tokenize"):
        with pytest.raises(UserError, match=f"no variable '{name}'"):
            rendered(vocabulary, user("hi"), chat_template_kwargs={name: 1})


def test_a_template_may_refuse_in_its_own_words(vocabulary: Vocabulary):
    vocabulary.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        rendered(vocabulary, user("hi"))


def test_a_template_that_breaks_is_not_our_failure(vocabulary: Vocabulary):
    vocabulary.tokenizer.chat_template = "{{ messages[0].content + 5 }}"
    with pytest.raises(UserError, match="refuses"):
        rendered(vocabulary, user("hi"))
