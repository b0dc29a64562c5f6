"""Chat templates against transformers, and what a template may not do."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from llama_hpc.errors import UsageError
from llama_hpc.text.chat import ChatTemplate

REFERENCE = json.loads((Path(__file__).parents[1] / "data/tokenizer_reference.json").read_text(encoding="utf-8"))
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [{"role": "user", "content": "hi"}]


def render(template: str, messages=MESSAGES, now: datetime | None = None) -> str:
    return ChatTemplate(template, "model", NAMES).render(messages, True, now)


@pytest.mark.parametrize("name", REFERENCE["templates"])
@pytest.mark.parametrize("chat", REFERENCE["chats"])
def test_templates_render_as_in_transformers(name, chat):
    case = REFERENCE["templates"][name]
    template = ChatTemplate(case["template"], "model", NAMES)
    texts = [template.render(REFERENCE["chats"][chat], prompt, None) for prompt in (False, True)]
    assert texts == case["rendered"][chat]


def test_dates_come_from_the_time_given():
    assert render("{{ strftime_now('%d %b %Y') }}", now=datetime(2024, 7, 26)) == "26 Jul 2024"


def test_the_exception_of_a_template_is_told_in_its_words():
    with pytest.raises(UsageError, match="model: Roles must alternate"):
        render("{{ raise_exception('Roles must\n alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages['__class__'] }}",
        "{{ raise_exception.__globals__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0] }}",
    ],
)
def test_a_template_cannot_reach_python_through_attributes(template):
    with pytest.raises(UsageError, match=r"access to attribute '__[a-z]+__' of '.*' is not allowed"):
        render(template)


def test_a_template_cannot_change_the_messages():
    with pytest.raises(UsageError, match="access to attribute 'append' of 'list' is not allowed"):
        render("{{ messages.append(1) }}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja.*endfor"),
        ("{{ messages[0].missing.text }}", "has no attribute 'missing'"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_broken_template_is_one_clear_line(template, message):
    with pytest.raises(UsageError, match=message) as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", ["hi", {"role": "user"}, ["hi"], None])
def test_messages_of_another_shape_are_refused(messages):
    with pytest.raises(UsageError, match="`messages` must be a list of objects"):
        render("{{ messages }}", messages)
