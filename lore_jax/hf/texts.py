"""What is embedded: a plain text, or a conversation that ends with the response."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]


def check_text(value: Any, where: str) -> str | Messages:
    """A text, or a conversation without the fields that are None.

    Raises:
      TypeError: it is neither a string nor a list of messages with a role and a
        content that are strings.
      ValueError: it is empty, or holds half of a surrogate pair.
    """
    if isinstance(value, str):
        return _whole(value, where)
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise TypeError(
            f"{where} must be a string or a list of messages, got {type(value)}"
        )
    if not value:
        raise ValueError(f"{where} must hold at least one message, got none")
    return [
        _message(message, f"{where}, message {i}") for i, message in enumerate(value)
    ]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{where} must be {{'role': …, 'content': …}}, got {type(value)}"
        )
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            raise TypeError(
                f"{where}: {key} must be a string, got {type(value.get(key))}: "
                f"{str(value.get(key))[:60]!r}"
            )
        _whole(value[key], f"{where}, {key}", may_be_empty=key == "content")
    return {key: x for key, x in value.items() if x is not None}


def _whole(text: str, where: str, may_be_empty: bool = False) -> str:
    """The text, if a tokenizer and a file can take it."""
    if not text and not may_be_empty:
        raise ValueError(f"{where} must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a character, the lone surrogate "
            f"U+{ord(text[error.start]):X}, at place {error.start}"
        ) from error
    return text


def text_key(text: str | Messages) -> str:
    """A string that is equal for equal texts only."""
    if isinstance(text, str):
        return "text:" + text
    return "chat:" + json.dumps(text, sort_keys=True, ensure_ascii=False, default=str)
