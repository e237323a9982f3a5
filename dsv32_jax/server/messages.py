"""Reads the messages of a chat, in the form that a chat template takes."""

from typing import Any

from dsv32_jax.server.fields import Fields, shown

__all__ = ["read_messages"]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
KNOWN = {"role", "content", "name", "refusal", "annotations", "reasoning_content"}
NEUTRAL: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "function_call": (), "audio": (), "tool_call_id": ()}
"""Further fields of OpenAI's answers, which clients may send back unchanged."""


def read_messages(fields: Fields) -> list[dict[str, str]]:
    """The field `messages`, each with role and text; raises `ApiError`."""
    messages = fields.value("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.error("messages", "must be a list of at least one message")
    return [_message(fields, number, message) for number, message in enumerate(messages)]


def _message(fields: Fields, number: int, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise fields.error("messages", f"{number} is {shown(value)}; must be an object with role and content")
    message = Fields(value, f"messages.{number}.")
    message.only(KNOWN, NEUTRAL)
    role = message.text("role")
    if role not in ROLES:
        raise message.error("role", f"{shown(role)} is not supported; must be one of {', '.join(ROLES)}")
    content = message.value("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return {"role": ROLES[role], "content": "\n".join(_text(message, part) for part in parts)}


def _text(message: Fields, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise message.error("content", "must be a string, or a list of parts of type text")
    return message.as_text("content", part.get("text"))
