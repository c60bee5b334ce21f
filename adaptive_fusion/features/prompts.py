"""What a question asks for, as a few light numbers: what an input needs depends on what is asked of it.

Knows text only. Must not know of images, routers or logs, and never hands out the text itself: flags, shares,
counts and a hashed bag of words, from which the prompt cannot be read back.
"""

import math
import re
import zlib
from collections.abc import Iterator
from itertools import pairwise

PROMPT_VERSION = "prompt-1"
"""Version of the extractor; any change of a name or of a value changes it."""

BUCKETS = 16
HEAD_CHARS = 256
"""Only this many characters at either end are looked at: that is where a long prompt has its question."""

_TASKS: dict[str, tuple[str, str]] = {
    # name: (English words and two-word phrases, Chinese words), first match in this order names the kind
    "event": (
        "happens|happen|happened|happening|event|events|action|actions|moves|moved|changes|changed",
        "发生|动作|事件|移动|变化",
    ),
    "count": ("count|counts|number of|how many|how much", "多少|几个|几只|几条|几张|数一数|数量|个数"),
    "read": (
        "read|reads|reading|ocr|text|transcribe|transcription|word|words|say|says|written|write out|spell"
        "|label|labels|title|titled|quote|extract|parse",
        "读|文字|文本|识别|写着|写了|标题|标签|转录|提取|字幕",
    ),
    "where": (
        "where|locate|location|located|position|coordinates|point to|bounding box|box|bbox|find|click",
        "哪里|哪儿|位置|在哪|坐标|定位|找到|点击",
    ),
    "compare": (
        "compare|comparison|difference|differences|differ|different|same as|versus|vs|both images",
        "比较|对比|区别|差异|不同|相同",
    ),
    "describe": (
        "describe|description|caption|summarize|summarise|summary|overview|explain|tell me|depict",
        "描述|说明|概括|总结|介绍|讲讲|标注",
    ),
}
_KINDS = {"where": "other", "compare": "other"}
_ENGLISH = {task: frozenset(english.split("|")) for task, (english, _) in _TASKS.items()}
_CHINESE = {task: re.compile(chinese) for task, (_, chinese) in _TASKS.items()}
_YES_NO_START = re.compile(
    r"(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|isn|aren|don|doesn)\b"
)
_REQUEST = re.compile(r"(?:can|could|will|would) you (?:please )?(?!see\b|find\b|tell (?:me )?(?:if|whether)\b)")
_YES_NO_TEXT = re.compile(r"yes or no|yes/no|true or false|是否|是不是|有没有|对吗|吗[?\uff1f]?$|能不能|会不会")
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_CJK_RUN = re.compile(_CJK.pattern + "+")
_DIGIT = re.compile(r"\d")
_QUOTED = re.compile(r"\"[^\"]+\"|“[^”]+”|「[^」]+」|『[^』]+』|(?<!\w)'[^']+'(?!\w)|`[^`]+`")

PROMPT_FEATURE_NAMES: tuple[str, ...] = (
    "prompt_log_chars",
    "prompt_log_words",
    "prompt_digits",
    "prompt_quoted",
    "prompt_question",
    "prompt_cjk",
    "prompt_yesno",
    *(f"prompt_{task}" for task in _TASKS),
    *(f"prompt_hash_{bucket:02d}" for bucket in range(BUCKETS)),
)
"""Names of all features, in order; every one begins with ``prompt_``."""

PROMPT_KINDS = ("count", "describe", "event", "other", "read", "yesno")


def _looked_at(prompt: str) -> str:
    head = prompt if len(prompt) <= 2 * HEAD_CHARS else f"{prompt[:HEAD_CHARS]} {prompt[-HEAD_CHARS:]}"
    return head.strip().lower()


def _terms(text: str, words: list[str]) -> Iterator[str]:
    """English words as they stand and Chinese character pairs (or a single one that stands alone)."""
    yield from words
    for run in _CJK_RUN.findall(text):
        yield from (a + b for a, b in pairwise(run)) if len(run) > 1 else (run,)


def _asks(text: str, words: list[str]) -> dict[str, bool]:
    said = {*words, *(f"{a} {b}" for a, b in pairwise(words))}
    chinese = not text.isascii()
    asks = {
        task: not said.isdisjoint(_ENGLISH[task]) or (chinese and _CHINESE[task].search(text) is not None)
        for task in _TASKS
    }
    asks["yesno"] = _YES_NO_START.match(text) is not None or _YES_NO_TEXT.search(text) is not None
    return asks


def prompt_features(prompt: str) -> dict[str, float]:
    """Light features of a prompt, in the order of `PROMPT_FEATURE_NAMES`; tens of microseconds.

    Logarithms of its length in characters and words (a Chinese character counts as a word), number of digits
    (log), flags for quoted text, a question mark, a yes/no question and each task asked for in English or
    Chinese, the share of Chinese characters, and a signed bag of words hashed into 16 buckets by CRC-32 and
    scaled to length 1 (feature hashing, arXiv:0902.2206), the same on every machine.
    """
    text = _looked_at(prompt)
    words = _WORD.findall(text)
    asks = _asks(text, words)
    cjk = 0 if text.isascii() else len(_CJK.findall(text))
    seen = max(1, len(text))
    buckets = [0.0] * BUCKETS
    for term in _terms(text, words):
        code = zlib.crc32(term.encode("utf-8", "surrogatepass"))
        buckets[code % BUCKETS] += 1.0 if code & 0x80000000 else -1.0
    norm = math.sqrt(sum(b * b for b in buckets)) or 1.0
    return {
        "prompt_log_chars": math.log1p(len(prompt)),
        "prompt_log_words": math.log1p((len(words) + cjk) * max(1.0, len(prompt) / seen)),
        "prompt_digits": math.log1p(len(_DIGIT.findall(text))),
        "prompt_quoted": float(_QUOTED.search(text) is not None),
        "prompt_question": float("?" in text or "\uff1f" in text),
        "prompt_cjk": cjk / seen,
        "prompt_yesno": float(asks["yesno"]),
        **{f"prompt_{task}": float(asks[task]) for task in _TASKS},
        **{f"prompt_hash_{i:02d}": b / norm for i, b in enumerate(buckets)},
    }


def prompt_kind(prompt: str) -> str:
    """The kind of answer a prompt asks for, one of `PROMPT_KINDS`: for expected answer lengths and logs."""
    text = _looked_at(prompt)
    asks = _asks(text, _WORD.findall(text))
    task = next((_KINDS.get(task, task) for task in _TASKS if asks[task]), "other")
    # "Can you read the text?" wants the text, not a yes.
    requested = _REQUEST.match(text) is not None and task != "other" and not _YES_NO_TEXT.search(text)
    return "yesno" if asks["yesno"] and not requested else task
