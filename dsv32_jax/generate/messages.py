"""Checks the messages of a chat before a chat template renders them."""

from collections.abc import Iterable, Mapping
from typing import Any

from dsv32_jax.common.arguments import shown
from dsv32_jax.common.reading import surrogate_in
from dsv32_jax.errors import UserError

__all__ = ["Message", "check_text", "checked_messages"]

Message = Mapping[str, Any]


def check_text(name: str, value: Any) -> str:
    """Returns the value if it is a text of whole Unicode characters; the error names it `name`."""
    if not isinstance(value, str):
        raise UserError(f"{name}: {shown(value)}; must be a text")
    if (at := surrogate_in(value)) is not None:
        raise UserError(f"{name}: character {at} is {value[at]!a}, half of a surrogate pair; must be a text")
    return value


def checked_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Returns the messages as a template takes them; fields other than role and content stay as they are.

    Content that is a list of parts of type text, as in OpenAI's API, becomes these texts, one a line. A message with
    `tool_calls` may have no content, which is left to the template.

    Raises:
      UserError: there is no message, or one is no mapping with a role and content; the error has its number.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise UserError(f"messages: {shown(messages)}; must be a list of messages, each with role and content")
    checked = [_checked(number, message) for number, message in enumerate(messages)]
    if not checked:
        raise UserError("messages: there is none; must be at least one")
    return checked


def _checked(number: int, message: Any) -> dict[str, Any]:
    name_of_message = f"messages {number}"
    if not isinstance(message, Mapping):
        raise UserError(f"{name_of_message}: {shown(message)}; must be a mapping with role and content")
    for name in ("role", "content"):
        if name not in message and not (name == "content" and message.get("tool_calls")):
            raise UserError(f"{name_of_message}: has no {name}; must be a mapping with role and content")
    role, content = check_text(f"{name_of_message}, role", message["role"]), message.get("content")
    if content is not None or not message.get("tool_calls"):
        content = _content(f"{name_of_message}, content", content)
    return {**message, "role": role, "content": content}


def _content(name: str, content: Any) -> str:
    if not isinstance(content, list | tuple):
        return check_text(name, content)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UserError(f"{name}: {shown(part)}; must be a text, or a list of parts of type text")
    return "\n".join(check_text(name, part.get("text")) for part in content)
