"""Chat messages to a row of tokens, through the processor's own chat template.

What people say stays text: a special token spelled out in a message ("what does <|im_end|> mean?") is tokenised as the
characters that it is made of, by transformers' own means for it, so it neither ends a turn nor stands for an image.
Nothing of a conversation gets lost: a template that does not show a tool, its answer or an image is refused. Knows
processors and messages. Must not know of operating points or models.
"""

import copy
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
    mark_control_tokens,
)

from adaptive_fusion.checks import strings
from adaptive_fusion.errors import ConfigError

Messages = Sequence[Mapping[str, Any]]

_MARKS = "\U000f0000", "\U000f0001"
"""Private characters that transformers puts around what is text, whatever it spells."""
_MARKED = re.compile(f"{_MARKS[0]}.*?{_MARKS[1]}", re.DOTALL)
_SHOWN = 300


class ChatTemplate:
    """The way from messages to tensors of one processor.

    Args:
        processor: A transformers processor with a tokenizer and a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._lock = threading.Lock()
        self._splitting: Any = None

    def tensors(
        self,
        messages: Messages,
        tools: Sequence[Any] = (),
        continues: bool | None = None,
        processor: Any = None,
        **media: Any,
    ) -> Any:
        """The processor's tensors for one conversation, as its ``BatchFeature``.

        Args:
            messages: Content is a list of parts, media loaded.
            tools: JSON schemas or functions.
            continues: Whether the answer goes on with the last message; None does so if it is the assistant's.
            processor: Used in place of the template's own for the media, with the same tokenizer.
            media: For the processor: images, videos and their options.

        Raises:
            ConfigError: If the template refuses the conversation or does not show all of it.
        """
        text, marked = self._conversation(messages, tools, continues)
        processor = processor or self.processor
        bos = getattr(processor.tokenizer, "bos_token", None)
        if bos and text.startswith(bos):  # else it would come twice, as in `apply_chat_template`
            media["add_special_tokens"] = False
        if not marked:
            return processor(text=[text], return_tensors="pt", **media)
        apart = copy.copy(processor)
        with self._lock:
            # Splitting special tokens is a switch on the tokenizer: another thread that uses it would fall over it.
            self._splitting = self._splitting or copy.deepcopy(self.processor.tokenizer)
            apart.tokenizer = self._splitting
            try:
                return apart(text=[text], return_tensors="pt", sanitize_control_tokens=True, **media)
            except (ValueError, NotImplementedError) as error:
                raise ConfigError(f"a special token in a message cannot be taken as text: {error}") from error

    def _conversation(self, messages: Messages, tools: Sequence[Any], continues: bool | None) -> tuple[str, bool]:
        """The conversation as one text, and whether what spells a special token in it is between `_MARKS`."""
        if continues is None:
            continues = messages[-1]["role"] == "assistant"
        if continues and not "".join(_texts(messages[-1])).strip():
            messages, continues = messages[:-1], False  # nothing was begun yet
        shown, shown_tools, marked = self._marked(messages, _described(tools))
        text = self._rendered(shown, shown_tools, continues)
        self._check_media(_MARKED.sub("", text) if marked else text, shown)
        for what, fewer, fewer_tools in _without(shown, shown_tools):
            try:
                same = self._rendered(fewer, fewer_tools, continues) == text
            except ConfigError:  # a template that cannot do without it reads it
                continue
            if same:
                raise ConfigError(f"the model's chat template does not show {what}")
        return text, marked

    def _rendered(self, messages: Messages, tools: Sequence[Any], continues: bool) -> str:
        from jinja2.exceptions import TemplateError

        options: dict[str, Any] = {"continue_final_message": True} if continues else {}
        if tools:
            options["tools"] = list(tools)
        try:
            text: str = self.processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=not continues, **options
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"the model's chat template refuses the conversation: {str(error)[:_SHOWN]}") from error
        return text

    def _marked(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Messages, Sequence[Mapping[str, Any]], bool]:
        """The same with what spells a special token marked as text, and whether there was any."""
        control = self._control_tokens()
        for message in messages:
            _refuse_split(message, control)
        said = [*strings([_beside_media(message) for message in messages]), *strings(tools)]
        if not any(control.search(text) for text in said):
            return messages, tools, False
        if mark := next((mark for mark in _MARKS for text in said if mark in text), None):
            raise ConfigError(
                f"the messages have both a special token and the private character U+{ord(mark):04X}; expected only one"
            )
        plain = [dict(message) for message in messages]
        shown, shown_tools = (_keys_marked(mark_control_tokens(v, control), control) for v in (plain, list(tools)))
        return shown, shown_tools, True

    def _control_tokens(self) -> re.Pattern[str]:
        tokenizer = self.processor.tokenizer
        found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        found |= {*tokenizer.all_special_tokens, *(filter(None, (self._place(kind) for kind in ("image", "video"))))}
        longest_first = sorted((token for token in found if not token.isspace()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _place(self, kind: str) -> str | None:
        return getattr(self.processor, f"{kind}_token", None)

    def _check_media(self, text: str, messages: Messages) -> None:
        """Refuse a template without a place for an image or clip."""
        for kind in ("image", "video"):
            there = sum(part["type"] == kind for part in media_parts(messages))
            place = self._place(kind)
            if place is not None and text.count(place) != there:
                raise ConfigError(
                    f"the model's chat template has places for {text.count(place)} of {there} {kind}s; expected "
                    "them in messages whose media it shows, such as the user's"
                )


def _described(tools: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Tools as JSON schemas; functions are described by their docstring and annotations."""
    try:
        return [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]
    except (DocstringParsingException, TypeHintParsingException, ValueError, TypeError) as error:
        raise ConfigError(f"a tool cannot be described: {str(error)[:_SHOWN]}") from error


def _without(messages: Messages, tools: Sequence[Any]) -> Iterator[tuple[str, list[Mapping[str, Any]], Sequence[Any]]]:
    """The same without what templates may not know, each kind at a time, and its name."""
    whole = list(messages)
    if tools:
        yield "tools", whole, ()
    for what, those in _kinds(whole):
        if any("".join(_texts(whole[index])).strip() for index in those):
            yield what, [_silent(m) if index in those else m for index, m in enumerate(whole)], tools
    for key in ("tool_calls", "reasoning_content"):
        if any(key in message for message in messages):
            yield key, [{k: v for k, v in message.items() if k != key} for message in messages], tools


def _kinds(messages: Messages) -> Iterator[tuple[str, set[int]]]:
    """Messages whose texts a template may leave out, by their places: those of one kind together, but each system
    message by itself, since some templates show only the first."""
    for index, message in enumerate(messages):
        if message["role"] == "system":
            yield "what the system says", {index}
    yield "what the tool says", {index for index, message in enumerate(messages) if message["role"] == "tool"}
    yield "what the assistant says beside a call", {i for i, message in enumerate(messages) if "tool_calls" in message}


def _silent(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its media alone."""
    return {**message, "content": [part for part in _parts(message) if part["type"] != "text"]}


def media_parts(messages: Messages) -> list[Mapping[str, Any]]:
    """The parts of all messages that are no text, in order."""
    return [part for message in messages for part in _parts(message) if part["type"] != "text"]


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(message: Mapping[str, Any]) -> list[str]:
    return [part["text"] for part in _parts(message) if part["type"] == "text"]


def _beside_media(message: Mapping[str, Any]) -> list[Any]:
    return [_texts(message), {key: value for key, value in message.items() if key not in ("role", "content")}]


def _keys_marked(value: Any, control: re.Pattern[str]) -> Any:
    """`value` with its keys marked as text too, which transformers leaves: those of a tool's arguments are written."""
    if isinstance(value, dict):
        mark = f"{_MARKS[0]}\\g<0>{_MARKS[1]}"
        return {
            control.sub(mark, key) if isinstance(key, str) else key: _keys_marked(entry, control)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [_keys_marked(entry, control) for entry in value]
    return value


def _refuse_split(message: Mapping[str, Any], control: re.Pattern[str]) -> None:
    """Refuse text parts that spell a special token together: each by itself looks harmless."""
    texts = _texts(message)
    if len(texts) > 1 and len(control.findall("".join(texts))) != sum(len(control.findall(text)) for text in texts):
        joined = "".join(texts)
        found = next(match for match in control.finditer(joined) if not any(match.group() in text for text in texts))
        raise ConfigError(f"text parts of a message spell {found.group()!r} together; expected it in one part")
