"""Structured answers of a model: JSON schemas of questions, and strict parsing."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mteditflow.chains.record import first_error
from mteditflow.rewards import AnswerError, Fault
from mteditflow.rewards.judge.answers import REFUSAL, after_reasoning, unwrap

Model = TypeVar("Model", bound=BaseModel)
SHOWN = 120  # characters of an answer in a message


def read_json(text: str, model: type[Model]) -> Model:
    """Parse an answer that must be one JSON object and nothing else.

    Reasoning before the object, a code fence around it and end tokens after it are removed.

    Args:
        text: answer of the model.
        model: class of the expected object.

    Raises:
        AnswerError: nothing follows the reasoning (``Fault.reasoning``); the text is a refusal
            (``Fault.refusal``) or other prose (``Fault.request_ignored``, which a server that
            honors the schema cannot return); or it is broken JSON, or another object
            (``Fault.format``). The message has the fault and its place.

    Example:
        >>> from mteditflow.planner import ListedObject
        >>> read_json('{"name": "cat", "count": 2}', ListedObject).count
        2
    """
    text = unwrap(text)
    if text[:1] != "{":  # only then, as a string in the JSON may contain the end-of-reasoning tag
        text = unwrap(after_reasoning(text))
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        if error.errors()[0]["type"] != "json_invalid":
            raise AnswerError(Fault.format, first_error(error)) from error
        detail = f"expected one JSON object and nothing else, got {text[:SHOWN]!r}"
        raise AnswerError(_fault_of_prose(text.lstrip()), detail) from error


def _fault_of_prose(text: str) -> Fault:
    if text[:1] in ("", "{"):
        return Fault.format
    return Fault.refusal if REFUSAL.match(text) else Fault.request_ignored


def strict_object(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object with exactly these properties, all of them required.

    Titles and defaults are removed: a default has no effect on a required property.

    Example:
        >>> strict_object({"count": {"type": "integer", "default": 1}})["properties"]
        {'count': {'type': 'integer'}}
    """
    return {
        "type": "object",
        "properties": {name: _plain(schema) for name, schema in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in ("title", "default")}
