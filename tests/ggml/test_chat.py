# SPDX-License-Identifier: Apache-2.0
"""Chat templates: what they see, what they may write, and what they may not do."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest

from spanker.errors import RequestError, TemplateError
from spanker.ggml.chat import MAX_TEMPLATE_CHARS, ChatTemplate
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: Any = HI, **options: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **options)


# --- the real model -----------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> tuple[ChatTemplate, Tokenizer]:
    with GGUFFile(smollm2_path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        return ChatTemplate.from_metadata(file.metadata, tokenizer), tokenizer


def test_smollm2_adds_its_system_message(smollm2: tuple[ChatTemplate, Tokenizer]) -> None:
    template, tokenizer = smollm2
    text = template.render([{"role": "user", "content": "What is gravity?"}])
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is gravity?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [i for i in tokenizer.encode(text) if tokenizer.is_special(i)] == [1, 2, 1, 2, 1]


def test_smollm2_with_a_system_message_and_turns(
    smollm2: tuple[ChatTemplate, Tokenizer],
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello"},
    ]
    assert smollm2[0].render(messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n Hi <|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_a_model_without_template_says_so(smollm2: tuple[ChatTemplate, Tokenizer]) -> None:
    with pytest.raises(TemplateError, match=r"no chat template \(tokenizer.chat_template\)"):
        ChatTemplate.from_metadata({}, smollm2[1])


# --- the environment ----------------------------------------------------------


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert render("{% if true %}\n  a\n  {% endif %}\nb\n") == "  a\nb"


def test_bos_and_eos_are_variables() -> None:
    assert render("{{ bos_token }}|{{ eos_token }}") == "<s>|</s>"


def test_tools_and_documents_are_none() -> None:
    assert render("{{ tools is defined and tools is none }} {{ documents is none }}") == "True True"


def test_loop_controls() -> None:
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
    source += "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "023"


def test_tojson_keeps_unicode_and_key_order() -> None:
    source = "{{ {'b': 'ä<', 'a': [1, none]} | tojson }}"
    assert render(source) == '{"b": "ä<", "a": [1, null]}'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


def test_strftime_now() -> None:
    years = {str(datetime.datetime.now().year + extra) for extra in (0, 1)}
    assert render("{{ strftime_now('%Y') }}") in years


def test_namespaces_macros_and_joining_work() -> None:
    source = (
        "{% set ns = namespace(n=0) %}"
        "{% macro show(m) %}[{{ m.role ~ ':' ~ 1 ~ none }}]{% endmacro %}"
        "{% for m in messages %}{% set ns.n = ns.n + 2 * 3 %}{{ show(m) }}{% endfor %}{{ ns.n }}"
    )
    assert render(source) == "[user:1None]6"
    assert render("{{ 7 % 4 }} {{ 2 ** 5 }} {{ 'ab' * 2 }} {{ [1] + [2] }}") == "3 32 abab [1, 2]"


def test_a_render_does_not_see_the_one_before() -> None:
    template = ChatTemplate("{% for i in range(60000) %}{% endfor %}{{ messages | length }}")
    assert {template.render(HI) for _ in range(4)} == {"1"}


def test_extra_text_items_of_a_message_reach_the_template() -> None:
    messages = [{"role": "user", "content": "x", "name": "Ann"}]
    assert render("{{ messages[0].name }}", messages) == "Ann"


# --- refusals -----------------------------------------------------------------


def test_raise_exception_refuses_the_messages_on_one_line() -> None:
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('roles must\nalternate') }}")
    assert str(caught.value) == "the chat template refuses the messages: roles must alternate"
    assert isinstance(caught.value, RequestError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"is invalid: .* \(line 1\)"),
        ("a\n{{ 'x' | nosuch }}", r"is invalid: .*nosuch.* \(line 2\)"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "is invalid"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), "has 262145 characters, at most 262144"),
    ],
)
def test_a_template_that_does_not_compile(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nope.nope }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[5].role }}",
        "{{ nosuch() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails(source: str) -> None:
    with pytest.raises(TemplateError, match="the chat template failed: ") as caught:
        render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.format.__func__ }}",
    ],
)
def test_the_sandbox_gives_nothing_away(source: str) -> None:
    try:
        assert render(source) == ""
    except TemplateError:
        pass


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ ('x' * 999) }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% set s = 'x' * 99 %}{% for a in s recursive %}{% if loop.depth < 9 %}{{ loop(s) }}"
        "{% endif %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{{ 'x' * 99 }}"
        "{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{{ [0] * 10**10 }}",
        "{{ 9 ** 99999 }}",
        "{{ 'x'.format_map({}) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x' | center(10**10) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ lipsum(n=10**9) }}",
        *(
            "{% set n = namespace(s='xx', i=3) %}{% for i in range(60) %}"
            f"{{% set {change} %}}{{% endfor %}}"
            for change in (
                "n.s = n.s + n.s",
                "n.s = n.s ~ n.s",
                "n.i = n.i * n.i",
                "n.s = n.s.replace('x', 'xx')",
            )
        ),
        "{% set s = 'x' * 4000000 %}{% for i in range(99999) %}{% set t = s + s %}{% endfor %}",
    ],
)
def test_a_hostile_template_ends_soon(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "0 messages"),
        ("Hi", "messages is a str, expected a list"),
        ({"role": "user", "content": "x"}, "messages is a dict, expected a list"),
        (["Hi"], "message 0 is a str, expected an object"),
        ([*HI, {"role": "user"}], "message 1: 'content' is missing, expected a string"),
        ([{"content": "x"}], "message 0: 'role' is missing"),
        ([{"role": "user", "content": None}], "'content' is NoneType, expected a string"),
        ([{"role": "user", "content": ["x"]}], "'content' is list"),
        ([{"role": "user", "content": "x", "n": 3}], "'n' is int"),
    ],
)
def test_bad_messages_are_refused_by_number(messages: Any, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render("{{ messages }}", messages)
