"""Conversations in the forms that clients use, normalised to the one form that the chat template renders.

OpenAI clients, agent frameworks and datasets write the same message in different ways: reasoning has three names,
content is a text or a list of parts, tool calls have foreign ids or none, results may lack the id of their call. Here
all become one form, and invalid messages are rejected with the index of the message, the index of the part and the
field. Given messages are never changed.

The model reads the name of a function, and learns which number comes next, from ids of the form `functions.NAME:N`,
where N counts the calls of the whole conversation. So missing ids are made in that form, and `normalize_tool_ids`
renames foreign ones.

This file works on text alone: it uses no tokenizer and no tensor.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import transformers

# What a message's reasoning may be called; the first that is not None counts.
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")
PART_TYPES = ("text", "image", "image_url", "video", "video_url")


def expect(value: Any, kinds: type | tuple[type, ...], field: str) -> None:
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{field} must be a {names}, not {value!r}")


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested dicts and lists with every string changed, keys of dicts too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    return value


def normalize_messages(messages: Iterable[Any], unique_ids: bool = True) -> list[dict[str, Any]]:
    """New messages in the form that the template renders; the given ones are not changed.

    role: required. name: replaces the role in the header. content: a text, a list of parts, or nothing. A part is a
    string, {"text": ...}, or a dict whose type is text, image, image_url, video or video_url. Reasoning of an
    assistant: `reasoning`, else `reasoning_content`, else `thinking`. A tool call without an id gets functions.NAME:N,
    where N counts the calls of the whole conversation, as the model itself numbers them; one without arguments gets
    {}. A tool result without tool_call_id answers the preceding assistant message if just one of its calls is open.
    Everything else is a ValueError with the index of the message and the field; so are two calls of one id, unless
    `unique_ids` is False, and a result whose id no call before it has.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError(f"a conversation is a list of at least one message, not {messages!r}")
    normalized = []
    num_calls, open_ids = 0, []
    used: dict[str, str] = {}  # id -> where
    for index, given in enumerate(messages):
        where = f"messages[{index}]"
        expect(given, Mapping, where)
        message = {key: value for key, value in given.items() if value is not None}
        if not message.get("role"):
            raise ValueError(f"{where}.role is missing")
        reasoning = next((message[field] for field in REASONING_FIELDS if field in message), "")
        for field, value in (
            ("role", message["role"]),
            ("name", message.get("name", "")),
            ("reasoning", reasoning),
        ):
            expect(value, str, f"{where}.{field}")
        message = {
            key: value for key, value in message.items() if key not in (*REASONING_FIELDS, "tool_calls")
        }
        message["content"] = normalize_content(message.get("content", ""), f"{where}.content")
        if message["role"] == "assistant":
            message["reasoning_content"] = reasoning
            calls = normalize_tool_calls(given.get("tool_calls") or [], num_calls, f"{where}.tool_calls")
            if calls:
                message["tool_calls"] = calls
            num_calls += len(calls)
            for position, call in enumerate(calls):
                here = f"{where}.tool_calls[{position}]"
                if unique_ids and call["id"] in used:
                    raise ValueError(f"{here}.id {call['id']!r} is already the id of {used[call['id']]}")
                used[call["id"]] = here
            open_ids = [call["id"] for call in calls]
        elif message["role"] == "tool":
            answered = answered_call(message.get("tool_call_id"), open_ids, where)
            if answered not in used:
                raise ValueError(f"{where}.tool_call_id {answered!r} is not the id of an earlier tool call")
            open_ids = [call_id for call_id in open_ids if call_id != answered]
            message["tool_call_id"] = answered
        normalized.append(message)
    return normalized


def normalize_content(content: Any, field: str) -> str | list[dict[str, Any]]:
    expect(content, (str, list, tuple), field)
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        part = {"text": part} if isinstance(part, str) else part
        expect(part, Mapping, f"{field}[{index}]")
        kind = part.get("type") or ("text" if "text" in part else None)
        if kind not in PART_TYPES:
            raise ValueError(f"{field}[{index}].type must be one of {PART_TYPES}, not {kind!r}")
        if kind == "text":
            expect(part.get("text"), str, f"{field}[{index}].text")
        if kind == "text" and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += part["text"]  # joined, so that no marker is split between two parts
        else:
            parts.append({**part, "type": kind})
    return parts


def normalize_tool_calls(calls: Any, num_before: int, field: str) -> list[dict[str, Any]]:
    """Calls with an id and arguments. `num_before` calls precede these in the conversation."""
    expect(calls, (list, tuple), field)
    normalized = []
    for index, call in enumerate(calls):
        where = f"{field}[{index}]"
        expect(call, Mapping, where)
        expect(call.get("function"), Mapping, f"{where}.function")
        name, arguments = call["function"].get("name"), call["function"].get("arguments")
        if not call.get("id") and not name:
            raise ValueError(f"{where} has no id, and no function.name to make one from")
        call_id = call.get("id") or f"functions.{name}:{num_before + index}"
        arguments = {} if arguments is None else arguments
        expect(call_id, str, f"{where}.id")
        expect(arguments, (str, Mapping), f"{where}.function.arguments")
        normalized.append({**call, "id": call_id, "function": {**call["function"], "arguments": arguments}})
    return normalized


def answered_call(call_id: Any, open_ids: list[str], where: str) -> str:
    """The id of the call that a tool result answers."""
    if not call_id and len(open_ids) != 1:
        raise ValueError(
            f"{where}.tool_call_id is missing, and the preceding assistant message has {len(open_ids)} open calls "
            f"{open_ids}; only with exactly one is it clear which call the result answers"
        )
    call_id = call_id or open_ids[0]
    expect(call_id, str, f"{where}.tool_call_id")
    return call_id


def normalize_tool_ids(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Normalised messages in which every call, and each result that answers it, has an id as the model makes them:
    functions.NAME:N. For histories of other models; the model copies the form of the ids it reads."""
    normalized = normalize_messages(messages, unique_ids=False)
    new_ids: dict[str, str] = {}
    num_calls = 0
    for message in normalized:
        if message["role"] == "tool":
            message["tool_call_id"] = new_ids.get(message["tool_call_id"], message["tool_call_id"])
        for call in message.get("tool_calls", []):
            expect(call["function"].get("name"), str, "function.name of a tool call to rename")
            new_ids[call["id"]] = call["id"] = f"functions.{call['function']['name']}:{num_calls}"
            num_calls += 1
    return normalized


def refuse_to_stop_thinking(options: Mapping[str, Any]) -> None:
    """Rejects options that turn thinking off: the model was trained to think in every turn, and on no other prompts."""
    off = {"none", "off", "disabled"}
    for name in ("thinking", "preserve_thinking", "enable_thinking", "reasoning_effort"):
        value = options.get(name)
        # The web API has {"type": "disabled"}.
        asked = value.get("type") if isinstance(value, Mapping) else value
        if value is not None and (not value or (isinstance(asked, str) and asked.lower() in off)):
            raise ValueError(
                f"{name}={value!r} is not available: Kimi K2.7 Code always thinks and keeps the reasoning of earlier "
                f"turns. Leave the option out."
            )


def field_to_continue(field: bool | str) -> bool | str:
    """The value of `continue_final_message` for the installed transformers, once messages are normalised."""
    if not isinstance(field, str) or field == "content":
        return bool(field)
    if field not in REASONING_FIELDS:
        raise ValueError(
            f"continue_final_message={field!r}: only 'content' and {REASONING_FIELDS} can be continued"
        )
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"continue_final_message={field!r} needs transformers 5; {transformers.__version__} is running"
        )
    return "reasoning_content"
