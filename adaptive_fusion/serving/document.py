"""What the OpenAPI document says of requests and answers.

Knows JSON Schema. The fields that it has are those of `fields`; a test holds the two together.
"""

from collections.abc import Mapping
from typing import Any

from adaptive_fusion.serving.fields import FIELDS, Use
from adaptive_fusion.serving.generate_options import MAX_SEED, MAX_STOPS
from adaptive_fusion.serving.schema import LIMITS, MAX_TOP_LOGPROBS, PARTS, ROLES

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


_DETAIL: Schema = {"type": "string", "enum": ["low", "high", "auto"]}
_URL: Schema = {
    "type": "object",
    "required": ["url"],
    "properties": {
        "url": {"type": "string", "description": "data: URL, or https of an allowed host"},
        "detail": _DETAIL,
    },
}
_PART: Schema = {
    "oneOf": [
        {
            "type": "object",
            "required": ["type", key],
            "properties": {"type": {"const": kind}, key: _TEXT if kind == "text" else _URL},
        }
        for kind, key in PARTS.items()
    ]
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "enum": list(ROLES)},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1}, {"type": "null"}]},
    },
}
_BUDGET: Schema = {
    "latency_ms": {"type": "number", "exclusiveMinimum": 0, "maximum": 3.6e6},
    "ttft_ms": {"type": "number", "exclusiveMinimum": 0, "maximum": 3.6e6},
    "vram_gb": {"type": "number", "exclusiveMinimum": 0, "maximum": 4096},
    "attainment": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "on_infeasible": {"type": "string", "enum": ["cheapest", "refuse"]},
    "on_deadline": {"type": "string", "enum": ["finish", "stop"]},
}
assert set(_BUDGET) == set(LIMITS)

HONOURED: Mapping[str, Schema] = {
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
    "model": _TEXT,
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}},
    "max_tokens": _integer(1, 1_000_000),
    "max_completion_tokens": _integer(1, 1_000_000),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, 1_000_000),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "min_tokens": _integer(0, 1_000_000),
    "ignore_eos": _FLAG,
    "seed": _integer(-MAX_SEED - 1, MAX_SEED),
    "stop": {
        "anyOf": [
            _TEXT,
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
            {"type": "null"},
        ]
    },
    "logprobs": _FLAG,
    "top_logprobs": _integer(0, MAX_TOP_LOGPROBS),
    "continue_final_message": _FLAG,
    "add_generation_prompt": _FLAG,
    "adaptive_fusion": {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "budget": {"type": "object", "additionalProperties": False, "properties": _BUDGET},
            "policy": _TEXT,
            "point": {"anyOf": [_TEXT, {"type": "object"}]},
            **_BUDGET,
        },
    },
}


def _chat(model: str) -> Schema:
    others = {
        name: {"description": field.use.value + (f" ({field.neutral})" if field.neutral else "")}
        for name, field in FIELDS.items()
        if field.use is not Use.HONOURED
    }
    return {
        "type": "object",
        "required": ["model", "messages"],
        "properties": {**HONOURED, "model": {"const": model}, **others},
    }


def _body(schema: Schema) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


_ERROR: Schema = {
    "description": "What is wrong, in OpenAI's form",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": _TEXT,
                            "type": _TEXT,
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
_RESPONSES: Schema = {"200": {"description": "Done"}, "4XX": _ERROR, "5XX": _ERROR}
_FEEDBACK: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["request_id", "rating"],
    "properties": {
        "request_id": _TEXT,
        "rating": {"anyOf": [{"enum": ["up", "down"]}, {"type": "number", "minimum": 0, "maximum": 1}]},
        "source_id": {"type": ["string", "null"], "minLength": 1, "maxLength": 200},
        "comment": {"type": ["string", "null"], "minLength": 1, "maxLength": 2000},
    },
}
_WHY: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"why": {"type": "string", "maxLength": 500}},
}
_OWN = "/v1/adaptive_fusion"
DECISION_PATH = f"{_OWN}/decisions/{{request_id}}"
MODEL_PATH = "/v1/models/{name:path}"
"""With slashes in the name, as the Hub's have them."""


def descriptions(model: str) -> Mapping[str, Schema]:
    """By path, what is put over what FastAPI finds out by itself; `model` is the name of the one that there is."""
    chat = {"requestBody": _body(_chat(model)), "responses": _RESPONSES}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [model]}}
    n = {"name": "n", "in": "query", "required": False, "schema": {"type": "integer", "minimum": 1}}
    pictures = {"name": "pictures", "in": "query", "required": False, "schema": {"type": "boolean"}}
    one = {"name": "request_id", "in": "path", "required": True, "schema": _TEXT}
    return {
        "/v1/chat/completions": chat,
        f"{_OWN}/decide": {**chat, "parameters": [pictures]},
        DECISION_PATH: {"parameters": [one], "responses": _RESPONSES},
        f"{_OWN}/policy": {"responses": _RESPONSES},
        f"{_OWN}/points": chat,
        f"{_OWN}/feedback": {"requestBody": _body(_FEEDBACK), "responses": _RESPONSES},
        f"{_OWN}/rollout": {"responses": _RESPONSES},
        f"{_OWN}/rollout/promote": {"requestBody": _body(_WHY), "responses": _RESPONSES},
        f"{_OWN}/rollout/abort": {"requestBody": _body(_WHY), "responses": _RESPONSES},
        f"{_OWN}/decisions": {"parameters": [n], "responses": _RESPONSES},
        MODEL_PATH: {"parameters": [name], "responses": _RESPONSES},
        "/ready": {"responses": _RESPONSES},
    }
