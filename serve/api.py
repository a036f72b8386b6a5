"""OpenAI's chat completions over an `Engine`: requests are checked here, answers are formatted here.

    body (JSON)   -> ChatRequest    fields, types and ranges by pydantic; what has no effect ends up in `warnings`
    messages      -> open_media     data URIs and http(s) become bytes; no address names a file of this machine
    tools         -> check_tools    each can be declared, or is refused by its index
    Event         -> chunk          one server-sent event
    Completion    -> completion     the whole answer
    any error     -> ApiError       a status, and OpenAI's {"error": {"message", "type", "param", "code"}}

No web framework is imported, so all of it can be called from tests and other programs.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kimi.kimi_media import decode_data_uri, describe, fetch, naming, unwrap
from kimi.kimi_messages import refuse_to_stop_thinking
from kimi.kimi_output import Event, delta_of
from kimi.kimi_tools import UnsupportedSchema, encode_tools_to_typescript_style, normalize_tool

from .engine import Completion, Engine, Prompt, PromptTooLong, QueueFull, Sampling

MAX_STOP_TEXTS = 16
MAX_SHOWN_CHARACTERS = 500  # of a request, in an error about it
MAX_WARNING_NAMES = 10
# Fields about the request or the account, which change no answer.
SILENT_FIELDS = {
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    "stream_options",
}  # fmt: skip
# Fields that would change the answer and have no effect here: a header says so. Default values cause no warning.
INERT_FIELDS = {
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}),
    "parallel_tool_calls": (None, True), "top_logprobs": (None, 0), "reasoning_effort": (None,),
    "thinking": (None, True), "enable_thinking": (None, True), "preserve_thinking": (None, True),
}  # fmt: skip
THINKING_SWITCHES = ("thinking", "enable_thinking", "preserve_thinking", "reasoning_effort")


# --- errors -----------------------------------------------------------------------------------------------------------


class ApiError(Exception):
    """A refusal in OpenAI's format. `param`: the field that is wrong. `headers`: of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def api_error(error: Exception) -> ApiError:
    """Any exception as an ApiError. What the caller could not have caused is a 500 without its details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            f"The server is busy: {error}.",
            code="server_busy",
            kind="rate_limit_error",
            headers={"Retry-After": str(error.retry_after_s)},
        )
    if isinstance(error, PromptTooLong):
        return bad_request(str(error), "messages", "context_length_exceeded")
    return ApiError(
        500,
        f"The server failed at this request ({type(error).__name__}).",
        kind="server_error",
        code="internal_error",
    )


@contextmanager
def refusing(param: str) -> Iterator[None]:
    """Whatever reading a part of the request raises is the request's fault: a 400 that names the part."""
    try:
        yield
    except (ApiError, PromptTooLong):
        raise
    except RecursionError:
        raise bad_request(f"{param} is nested too deeply", param) from None
    except (ValueError, OSError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise bad_request(
            shorten(str(error)) or f"{param} cannot be read ({type(error).__name__})", param
        ) from error


def shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


# --- requests ---------------------------------------------------------------------------------------------------------


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields that this server acts on. All others are kept as extras, for the warning."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def sampling(self) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(text for text in stop if text),
        )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def read_json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except RecursionError:
        raise bad_request("The body is nested too deeply.") from None
    except ValueError as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        raise bad_request(f"The body is not JSON: {shorten(str(error))}.") from None
    if not isinstance(value, dict):
        raise bad_request(f"The body must be a JSON object, not a {type(value).__name__}.")
    return value


def read_request(body: bytes, model_name: str) -> tuple[ChatRequest, list[str]]:
    """The request and the warnings about fields without effect. Raises ApiError."""
    given = read_json(body)
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # A union reports each of its members; the field itself is what the caller wrote.
        names = [str(part) for part in first["loc"] if not str(part).startswith(("str", "list[", "dict["))]
        name = ".".join(names)
        raise bad_request(f"{name}: {first['msg']}, found {shorten(repr(first['input']))}", name) from None
    if request.model != model_name:
        raise ApiError(
            404,
            f"The model {shorten(request.model)!r} does not exist here; this server has {model_name!r}.",
            "model",
            "model_not_found",
        )
    refuse_unsupported(request, given)
    return request, warnings_about(given)


def refuse_unsupported(request: ChatRequest, given: Mapping[str, Any]) -> None:
    """Raises ApiError for fields whose effect this server does not have."""
    for source, param in ((given, ""), (request.chat_template_kwargs or {}, "chat_template_kwargs.")):
        for name in THINKING_SWITCHES:
            with refusing(param + name):
                refuse_to_stop_thinking({name: source.get(name)})
    if request.n not in (None, 1):
        raise bad_request(f"n={request.n} is not available: this server gives one answer, n=1.", "n")
    if request.logprobs:
        raise bad_request("logprobs are not available; leave the field out.", "logprobs")
    kind = (request.response_format or {}).get("type", "text")
    if kind != "text":
        raise bad_request(
            f"response_format.type={shorten(repr(kind))} is not available: decoding under a grammar conflicts with the"
            " open thinking; ask for JSON in the messages, or declare a tool.",
            "response_format",
        )
    if request.tool_choice not in (None, "auto", "none"):
        raise bad_request(
            f"tool_choice={shorten(repr(request.tool_choice))} is not available: a model that always thinks decides"
            " itself; use 'auto' or 'none'.",
            "tool_choice",
        )
    if len(request.sampling.stop) > MAX_STOP_TEXTS:
        raise bad_request(
            f"stop has {len(request.sampling.stop)} texts, and at most {MAX_STOP_TEXTS} are allowed.", "stop"
        )


def warnings_about(given: Mapping[str, Any]) -> list[str]:
    """One sentence per kind of field that is ignored."""
    known = {*ChatRequest.model_fields, *SILENT_FIELDS, *INERT_FIELDS}
    unknown = [name for name in given if name not in known]
    inert = [name for name, usual in INERT_FIELDS.items() if name in given and given[name] not in usual]
    enabled = {"type": "enabled"}
    inert = [name for name in inert if not (name == "thinking" and given[name] == enabled)]
    options = [name for name in given.get("chat_template_kwargs") or {} if name not in THINKING_SWITCHES]
    named = (
        ("unknown fields ignored", unknown),
        ("fields without effect", inert),
        ("chat_template_kwargs ignored", options),
    )
    return [f"{what}: {quoted(names)}" for what, names in named if names]


def quoted(names: Sequence[str], max_length: int = 60) -> str:
    """Names for a header: ASCII, without line ends, not too many and not too long."""
    shown = ", ".join(json.dumps(name[:max_length]) for name in names[:MAX_WARNING_NAMES])
    return shown + (f" and {len(names) - MAX_WARNING_NAMES} more" if len(names) > MAX_WARNING_NAMES else "")


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass
class Limits:
    """max_body_bytes: of a request. max_media_bytes: of all encoded media of a request, fetched ones included.
    allowed_hosts: of loopback or private addresses from which media may be fetched."""

    max_body_bytes: int = 64 * 2**20
    max_media_bytes: int = 64 * 2**20
    allowed_hosts: tuple[str, ...] = ()


def prepare(engine: Engine, request: ChatRequest, limits: Limits, warnings: list[str]) -> Prompt:
    """The prompt of a request; raises ApiError or PromptTooLong. Slow where it fetches and decodes media."""
    tools = None if request.tool_choice == "none" else check_tools(request.tools, warnings)
    with refusing("messages"):
        messages = open_media(request.messages, limits)
        if renumber := repeats_a_call_id(messages):
            warnings.append("tool calls had one id more than once and were renumbered")
        prompt = engine.prepare_checked(messages, tools, renumber_calls=renumber)
    engine.answer_length(prompt, request.sampling.max_tokens)
    return prompt


def check_tools(tools: list[dict[str, Any]] | None, warnings: list[str]) -> list[dict[str, Any]] | None:
    """The tools, normalised, each of which can be declared; else ApiError with the index of the one that cannot. A schema
    that has no TypeScript form makes all of them JSON in the prompt, as in training, and a warning."""
    normalized = []
    for index, tool in enumerate(tools or []):
        param = f"tools[{index}]"
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise bad_request(f'{param} must be {{"type": "function", "function": {{...}}}}', param)
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad_request(f"{param}.function.name must be a text that is not empty", param)
        if not isinstance(function.get("parameters", {}), (dict, type(None))):
            raise bad_request(
                f"{param}.function.parameters must be a JSON schema, an object,"
                f" not {shorten(repr(function['parameters']))}",
                param,
            )
        with refusing(param):
            normalized.append(normalize_tool(tool, param))
            try:
                encode_tools_to_typescript_style(normalized[-1:])
            except UnsupportedSchema as error:
                warnings.append(f"tools are declared as JSON: {quoted([str(error)], 200)}")
    return normalized or None


def open_media(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """Copies of messages whose media are bytes. Only data URIs and http(s) addresses are read, never a path."""
    left = limits.max_media_bytes
    opened = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            opened.append(message)
            continue
        parts = list(content)
        for position, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") in (None, "text"):
                continue
            name = f"messages[{number}].content[{position}]"
            with naming(name):
                kind, data = read_part(part, left, limits.allowed_hosts)
            if data is not None:
                left -= len(data)
                if left < 0:
                    raise bad_request(
                        f"{name}: the media have more than {limits.max_media_bytes} bytes together",
                        "messages",
                    )
                parts[position] = {"type": kind, kind: data}
        opened.append({**message, "content": parts})
    return opened


def read_part(part: dict[str, Any], max_bytes: int, allowed_hosts: Sequence[str]) -> tuple[str, bytes | None]:
    """Kind and bytes of a content part that is a medium; None for a kind that is refused later, with its name."""
    kind = str(part.get("type")).removesuffix("_url")
    if kind not in ("image", "video"):
        return kind, None
    source = part.get(f"{kind}_url", part.get(kind))
    source = unwrap(source) if isinstance(source, (dict, str)) else source
    if isinstance(source, str) and ":" in source[:16]:
        scheme = source[: source.find(":")].strip().lower()
        if scheme == "data":
            return kind, decode_data_uri(source, kind)
        if scheme in ("http", "https"):
            return kind, fetch(source.strip(), allowed_hosts, max_bytes)
    raise ValueError(
        f'a medium is given as {{"type": "{kind}_url", "{kind}_url": {{"url": ...}}}} with a data: URI or an http(s)'
        f" address, not {describe(source)}"
    )


def repeats_a_call_id(messages: list[dict[str, Any]]) -> bool:
    """Whether two tool calls have one id: they are renumbered, so that a model that miscounts does not end the
    conversation."""
    calls = [
        call.get("id")
        for message in messages
        for call in message.get("tool_calls") or []
        if isinstance(call, Mapping) and isinstance(call.get("id"), str)
    ]
    return len(calls) != len(set(calls))


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """The fields that all parts of one answer share."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completion: Completion) -> dict[str, Any]:
        """`chat.completion`."""
        choice = {
            "index": 0,
            "message": message_of(completion),
            "logprobs": None,
            "finish_reason": completion.finish_reason,
        }
        return self._object("chat.completion", [choice], usage=usage_of(completion))

    def chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, with_usage: bool = False
    ) -> dict[str, Any]:
        """`chat.completion.chunk`. with_usage: the client asked for usage, which is null until the last one."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice], **({"usage": None} if with_usage else {}))

    def usage_chunk(self, completion: Completion) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [], usage=usage_of(completion))

    def _object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def delta_of_event(event: Event) -> dict[str, Any] | None:
    """The delta of an event; None for the end of a call, which OpenAI's stream does not announce."""
    if event.kind == "call_end":
        return None
    delta = delta_of(event)
    if "reasoning_content" in delta:
        delta["reasoning"] = delta["reasoning_content"]
    return delta


def message_of(completion: Completion) -> dict[str, Any]:
    """The message as OpenAI shapes it, its reasoning under both names that clients look for."""
    parsed = completion.message
    message: dict[str, Any] = {
        "role": "assistant",
        "content": parsed["content"],
        "reasoning": parsed["reasoning_content"],
        "reasoning_content": parsed["reasoning_content"],
        "refusal": None,
    }
    if parsed.get("tool_calls"):
        message["tool_calls"] = parsed["tool_calls"]
        message["content"] = parsed["content"] or None
    if parsed.get("unparsed_tool_calls"):  # no field of OpenAI's: what would otherwise be lost
        message["unparsed_tool_calls"] = parsed["unparsed_tool_calls"]
    return message


def usage_of(completion: Completion) -> dict[str, Any]:
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": completion.reasoning_tokens},
    }


def models_of(name: str, created: int, context: int) -> dict[str, Any]:
    return {"object": "list", "data": [model_of(name, created, context)]}


def model_of(name: str, created: int, context: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "local",
        "max_model_len": context,
    }


def to_bytes(value: Any) -> bytes:
    """JSON in UTF-8. A lone surrogate, which a request may hold and an error may quote, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", "replace"
    )
