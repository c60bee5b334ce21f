"""Conversations through chat templates: nothing that people write has structure, and nothing of it gets lost."""

import copy
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from waits import joined

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.models.chat_template import ChatTemplate

# As Qwen3-VL's own: tools before the system message, calls and their answers as the model was taught them.
WITH_TOOLS = """
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' }}{%- endif %}
{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}
{%- if message.tool_calls %}{%- for call in message.tool_calls %}
{%- set call = call.function if call.function else call %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{%- endif %}
{%- if message.role == 'tool' %}{{- '\\n</tool_response>' }}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
PICTURE = Image.new("RGB", (64, 64), (200, 30, 30))
TOOL = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"what": "K7"}'}}


def look_up(what: str) -> str:
    """
    Look something up.

    Args:
        what: Its name.
    """
    return what


@pytest.fixture(scope="module")
def template(processor: Any) -> ChatTemplate:
    return ChatTemplate(processor)


@pytest.fixture(scope="module")
def with_tools(processor: Any) -> ChatTemplate:
    found = copy.copy(processor)
    found.chat_template = WITH_TOOLS
    return ChatTemplate(found)


def row(template: ChatTemplate, messages: Any, tools: Any = None, **more: Any) -> list[int]:
    request = build_request(messages, None, tools=tools, **more)
    media = {"images": list(request.media)} if request.media else {}
    ids: list[int] = template.tensors(request.messages, request.tools, request.continues, **media)["input_ids"][
        0
    ].tolist()
    return ids


def spelled(template: ChatTemplate, ids: list[int]) -> str:
    return str(template.processor.tokenizer.decode(ids))


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


SHOW = {"type": "image", "image": PICTURE}
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n", "assistant", "<|", "|>", "é", "🙂"]), max_size=8))
def test_what_people_write_is_text_whatever_it_spells(template: ChatTemplate, pieces: list[str]) -> None:
    """The same special tokens as around a harmless question, the same picture, and every character there."""
    said = "".join(pieces)
    harmless, written = (row(template, [user(SHOW, text, {"type": "text", "text": "!"})]) for text in ("x", said))
    special = set(template.processor.tokenizer.added_tokens_decoder)
    assert [i for i in written if i in special] == [i for i in harmless if i in special]
    plain = spelled(template, harmless)
    assert spelled(template, written) == plain.replace("x!<|im_end|>", f"{said}!<|im_end|>")


def test_a_question_without_special_tokens_is_tokenised_as_ever(template: ChatTemplate) -> None:
    messages = [user(SHOW, "What is < | > here?")]
    request = build_request(messages, None)
    text = template.processor.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
    whole = template.processor(text=[text], images=[PICTURE], return_tensors="pt")
    assert row(template, messages) == whole["input_ids"][0].tolist()


def test_threads_do_not_disturb_each_other(template: ChatTemplate) -> None:
    """Splitting special tokens is a switch on the tokenizer, which others use meanwhile."""
    messages = [user("say <|im_end|>"), user("say it")]
    wanted, found = [row(template, [m]) for m in messages], [[], []]  # type: list[list[int]], list[list[list[int]]]

    def work(index: int) -> None:
        for _ in range(30):
            found[index].append(row(template, [messages[index]]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    joined(threads)
    assert all(each == wanted[index] for index in (0, 1) for each in found[index])


def test_parts_that_spell_a_special_token_together_are_refused(template: ChatTemplate) -> None:
    with pytest.raises(ConfigError, match=r"spell '<\|im_end\|>' together"):
        row(template, [user("<|im_", "end|> now")])


def test_a_private_mark_beside_a_special_token_is_refused(template: ChatTemplate) -> None:
    with pytest.raises(ConfigError, match=r"U\+F0000"):
        row(template, [user("\U000f0000<|im_end|>")])
    assert "\U000f0000" in spelled(template, row(template, [user("\U000f0000 alone")]))


@pytest.mark.parametrize("half", ["\ud83d", "\udc00", "a\udfffb"])
@pytest.mark.parametrize("place", ["prompt", "part", "system", "tool", "arguments"])
def test_half_a_character_is_refused_wherever_it_is(half: str, place: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": half if place == "system" else "s"},
        user(half if place == "part" else "x"),
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": half if place == "arguments" else "c1"}]},
        user("y"),
    ]
    with pytest.raises(ConfigError, match=r"half a character \(U\+D[89A-F][0-9A-F]{2}\) at position"):
        build_request(
            messages,
            half if place == "prompt" else "?",
            tools=[{**TOOL, "note": half}] if place == "tool" else None,
        )


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab K7,\n", min_size=1).filter(str.strip))
def test_a_begun_answer_is_gone_on_with(template: ChatTemplate, begun: str) -> None:
    asked = [user(SHOW, "Describe.")]
    base, whole = row(template, asked), row(template, [*asked, {"role": "assistant", "content": begun}])
    assert spelled(template, whole) == spelled(template, base) + begun
    anew = row(template, [*asked, {"role": "assistant", "content": begun}], continue_final_message=False)
    assert spelled(template, anew).endswith(f"{begun}<|im_end|>\n<|im_start|>assistant\n")


def test_nothing_begun_is_a_plain_question(template: ChatTemplate) -> None:
    assert row(template, [user("x"), {"role": "assistant", "content": ""}]) == row(template, [user("x")])


@pytest.mark.parametrize(
    ("messages", "wanted", "message"),
    [
        ([user("x")], True, "is of the user"),
        ([user("x"), {"role": "assistant", "content": [SHOW]}], None, "text to go on with"),
        ([user("x"), {"role": "assistant", "content": "y", "tool_calls": [CALL]}], None, "tool call"),
        ([user("x")], "yes", "'yes'; expected True, False or None"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(messages: Any, wanted: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_request(messages, None, continue_final_message=wanted)


@pytest.mark.parametrize("tool", [TOOL, look_up])
def test_tools_their_calls_and_answers_go_through_the_template(with_tools: ChatTemplate, tool: Any) -> None:
    messages = [
        user(SHOW, "What is K7?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "name": "look_up", "content": "a <|im_end|> sort of key"},
    ]
    text = spelled(with_tools, row(with_tools, messages, tools=[tool]))
    for said in ('"name": "look_up"', '"arguments": {"what": "K7"}', "a <|im_end|> sort of key\n</tool_response>"):
        assert said in text


@pytest.mark.parametrize("token", SPECIAL)
def test_the_names_of_a_tools_arguments_are_text_too(with_tools: ChatTemplate, token: str) -> None:
    def ids(name: str) -> list[int]:
        parameters = {"type": "object", "properties": {name: {"type": "string", "description": name}}}
        call = {"id": name, "type": "function", "function": {"name": "look_up", "arguments": {name: [{name: name}]}}}
        messages = [user(SHOW, "q"), {"role": "assistant", "content": None, "tool_calls": [call]}, user("x")]
        described = {"type": "function", "function": {**TOOL["function"], "parameters": parameters}}
        return row(with_tools, messages, tools=[described])

    special = set(with_tools.processor.tokenizer.added_tokens_decoder)
    harmless, written = ids("x"), ids(token)
    assert [i for i in written if i in special] == [i for i in harmless if i in special]
    assert spelled(with_tools, written).count(token) == spelled(with_tools, harmless).count(token) + 5


@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [
        ([user("look_up K7")], [TOOL], "tools"),
        ([user("x"), {"role": "assistant", "content": "look_up", "tool_calls": [CALL]}, user("y")], None, "tool_calls"),
        (
            [user("x"), {"role": "assistant", "content": "y", "reasoning_content": "hm"}, user("z")],
            None,
            "reasoning_content",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(template: ChatTemplate, messages: Any, tools: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=f"does not show {what}"):
        row(template, messages, tools)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, user("x")], "what the system says"),
        (
            [user("x"), {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}, user("y")],
            "what the assistant says beside a call",
        ),
    ],
)
def test_each_message_is_shown_or_refused(processor: Any, messages: Any, what: str) -> None:
    """Templates that show one message of a kind may leave out another."""
    partial = copy.copy(processor)
    partial.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls }}"
        "{% elif m.role != 'system' or loop.first %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(ConfigError, match=f"does not show {what}"):
        row(ChatTemplate(partial), messages)


def test_images_where_a_template_has_no_place_for_them_are_refused(processor: Any) -> None:
    blind = copy.copy(processor)
    blind.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match="0 of 1 images"):
        row(ChatTemplate(blind), [user(SHOW, "x")])


def test_a_template_that_refuses_is_a_config_error(processor: Any) -> None:
    strict = copy.copy(processor)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="roles must alternate"):
        row(ChatTemplate(strict), [user("x")])


@pytest.mark.parametrize(("key", "value"), [("tool_call_id", "c2"), ("name", "other")])
def test_an_answer_to_a_call_that_nobody_made_is_refused(key: str, value: str) -> None:
    messages = [user("x"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(ConfigError, match=f"{key} '{value}'.*'c1', 'look_up'"):
        build_request([*messages, {"role": "tool", "content": "z", key: value}], None)


@pytest.mark.parametrize("more", [{"tool_calls": 5}, {"tool_calls": ["f()"]}, {"reasoning_content": ["a"]}])
def test_calls_and_thoughts_of_another_form_are_refused(more: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(more))} .*expected a "):
        build_request([user("x"), {"role": "assistant", "content": "y", **more}, user("z")], None)


def test_an_id_that_is_no_string_is_refused() -> None:
    call = {**CALL, "id": ["c1"]}
    messages = [user("x"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(ConfigError, match=r"tool_call_id .*expected a string"):
        build_request([*messages, {"role": "tool", "content": "z", "tool_call_id": ["c1"]}], None)


@pytest.mark.parametrize("tools", ["look_up", [3], {"a": 1}, [TOOL, None], [{"description": {1, 2}}]])
def test_tools_of_another_form_are_refused(tools: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected (a list of )?JSON schemas or functions"):
        build_request(None, "x", tools=tools)
