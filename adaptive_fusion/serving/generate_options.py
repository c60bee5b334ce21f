"""The fields of a chat request that say how tokens are chosen and where the answer ends, as options of ``generate``.

Knows OpenAI's and vLLM's names and transformers'. Must not know of messages, models or HTTP.
"""

from collections.abc import Mapping
from typing import Any

from adaptive_fusion.checks import integer, number, whole_characters
from adaptive_fusion.serving.reading import checked, flag, refused

MAX_STOPS = 16
MAX_SEED = 2**63 - 1


def generate_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``generate`` is told, but for how long the answer may be.

    Raises:
        Refusal: 400 with the field's name.
    """
    stops = stops_of(given)
    return _sampling(given) | _at_least(given) | ({"stop_strings": list(stops)} if stops else {})


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``generate`` that choose tokens. Without a word about it the model's own configuration holds."""
    options: dict[str, Any] = {}
    if "temperature" in given:
        heat = checked("temperature", lambda: number(given["temperature"], "temperature", 0.0, 2.0))
        options |= {"do_sample": True, "temperature": heat} if heat > 0 else {"do_sample": False}
    bounds = {"top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
    for name, (low, high) in bounds.items():
        if name in given:
            options[name] = checked(name, lambda n=name, a=low, b=high: number(given[n], n, a, b))  # type: ignore[misc]
    if "top_k" in given:
        top_k = checked("top_k", lambda: integer(given["top_k"], "top_k", -1, 1_000_000))
        options["top_k"] = max(top_k, 0)
    # Whoever narrows the choice wants one to be made.
    narrowed = options.get("top_p", 1.0) < 1.0 or options.get("min_p", 0.0) > 0.0 or options.get("top_k", 0) > 0
    if narrowed and "do_sample" not in options:
        options["do_sample"] = True
    if options.get("do_sample") is False:
        options = {"do_sample": False}
    if "repetition_penalty" in given:
        options["repetition_penalty"] = checked(
            "repetition_penalty", lambda: number(given["repetition_penalty"], "repetition_penalty", 0.01, 10.0)
        )
    return options


def _at_least(given: Mapping[str, Any]) -> dict[str, Any]:
    """The option that keeps an answer from ending early; ``ignore_eos`` lets it end at its limit alone."""
    least = checked("min_tokens", lambda: integer(given.get("min_tokens", 0), "min_tokens", 0, 1_000_000))
    if flag(given, "ignore_eos"):
        least = most_tokens(given) or 0
        if not least:
            raise refused("ignore_eos", "ignore_eos is true without max_tokens; expected max_tokens beside it")
    return {"min_new_tokens": least} if least else {}


def most_tokens(given: Mapping[str, Any]) -> int | None:
    """Most tokens of the answer; None where the request does not say."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    values = {name: checked(name, lambda n=name: integer(given[n], n, 1, 1_000_000)) for name in names}  # type: ignore[misc]
    if len(set(values.values())) > 1:
        said = " and ".join(f"{name} {value}" for name, value in values.items())
        raise refused(names[0], f"the request says {said}; expected one of them")
    most = next(iter(values.values()), None)
    if most is not None and isinstance(given.get("min_tokens"), int) and given["min_tokens"] > most:
        raise refused("min_tokens", f"min_tokens is {given['min_tokens']}; expected at most the {most} of {names[0]}")
    return most


def seed_of(given: Mapping[str, Any]) -> int | None:
    """Of the sampling; None where the request does not say."""
    return checked("seed", lambda: integer(given["seed"], "seed", -MAX_SEED - 1, MAX_SEED)) if "seed" in given else None


def stops_of(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Strings at which the answer ends."""
    value = given.get("stop")
    if value is None or value == []:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(stop, str) and stop for stop in found):
        raise refused("stop", "stop is empty or no text; expected a string or a list of strings")
    if len(found) > MAX_STOPS:
        raise refused("stop", f"stop has {len(found)} strings; expected at most {MAX_STOPS}")
    if any(len(stop) > 200 for stop in found):
        raise refused("stop", "stop has a string of more than 200 characters; expected shorter ones")
    return tuple(checked("stop", lambda s=stop: whole_characters(s, "stop")) for stop in found)  # type: ignore[misc]
