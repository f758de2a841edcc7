"""What may come over the wire, and OpenAI's errors for what may not.

Requests are checked here, field by field, against https://platform.openai.com/docs/api-reference; a field
that the endpoint does not honour and that would change the answer is refused, one that would not is passed
over.
"""

import json
import re
import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

Tokens = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]  # a limit of tokens; llama.cpp counts in 32 bits
AnyRequest = TypeVar("AnyRequest", bound="Request")
NESTING = (
    64  # levels of JSON in a body: more than a schema or a conversation needs, fewer than exhaust a stack
)


class ApiError(Exception):
    """An error as OpenAI's API answers it: HTTP status, message, `type`, `param` and `code`."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class Request(BaseModel):
    """The common rules of all bodies: types are strict, unknown fields are kept and ignored."""

    model_config = ConfigDict(extra="allow")
    model: StrictStr


class JsonSchemaFormat(BaseModel):
    name: StrictStr = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema", default_factory=lambda: {"type": "object"})
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Function(BaseModel):
    name: StrictStr = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: StrictStr


class NamedTool(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class Sampled(Request):
    """What all three generating routes know of sampling."""

    temperature: StrictFloat | None = Field(default=None, ge=0, le=2)
    top_p: StrictFloat | None = Field(default=None, ge=0, le=1)


class Penalised(Sampled):
    """What the two completion routes know beyond that."""

    stop: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] | None = None
    seed: StrictInt | None = None
    presence_penalty: StrictFloat | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: StrictFloat | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[StrictFloat, Field(ge=-100, le=100)]] | None = None


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = None


class CalledFunction(BaseModel):
    name: StrictStr
    arguments: StrictStr


class ToolCall(BaseModel):
    id: StrictStr
    type: Literal["function"] = "function"
    function: CalledFunction


class Part(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[Part], Field(min_length=1, fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None


class ChatRequest(Penalised):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: StrictInt | None = Field(default=None, ge=1, le=128)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @model_validator(mode="after")
    def _no_tools_where_none_may_be_called(self):
        if self.tool_choice == "none" and self.tools:
            self.tools = None
        return self


class CompletionRequest(Penalised):
    """POST /v1/completions: the older API, where the prompt is text and not a conversation."""

    prompt: StrictStr
    stream: Literal[False] | None = None
    echo: StrictBool | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    max_tokens: StrictInt | None = Field(default=None, ge=0, le=2**31 - 1)
    logprobs: StrictInt | None = Field(default=None, ge=0, le=100)


class EmbeddingRequest(Request):
    """POST /v1/embeddings."""

    input: (
        StrictStr
        | Annotated[list[StrictStr], Field(fail_fast=True)]
        | Annotated[list[StrictInt], Field(fail_fast=True)]
        | Annotated[list[list[StrictInt]], Field(fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: StrictInt | None = None


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: StrictBool | None = None


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    format: TextFormat | None = None


class ResponsesTool(Function):
    type: Literal["function"]


class ResponsesToolChoice(BaseModel):
    type: Literal["function"]
    name: StrictStr


class Item(BaseModel):
    """One of the things that a Responses input lists; which fields it must have depends on its type."""

    model_config = ConfigDict(extra="allow")
    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: StrictStr | Annotated[list[Part], Field(min_length=1, fail_fast=True)] | None = None
    call_id: StrictStr | None = None
    name: StrictStr | None = None
    arguments: StrictStr | None = None
    output: StrictStr | Annotated[list[Part], Field(min_length=1, fail_fast=True)] | None = None


class ResponsesRequest(Sampled):
    """POST /v1/responses."""

    input: StrictStr | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    stream: StrictBool | None = None
    store: StrictBool | None = None
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    truncation: Literal["disabled"] | None = None
    seed: StrictInt | None = None
    max_output_tokens: Tokens | None = None
    text: TextOptions | None = None
    tools: list[ResponsesTool] | None = Field(default=None, max_length=128, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    metadata: dict[str, StrictStr] | None = None


def decoded(raw: bytes) -> Any:
    """The body's JSON; raises ApiError for what is none: NaN, half a character, too deep a nest."""
    try:
        body = json.loads(raw)
        # What cannot be written again cannot be handed on: infinite numbers, halves of characters.
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        if _depth(body) <= NESTING:
            return body
    except (ValueError, RecursionError):
        pass
    raise ApiError("We could not parse the JSON body of your request.", code="invalid_json")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def parse(kind: type[AnyRequest], body: Any) -> AnyRequest:
    """`body` as a request of this kind; raises ApiError 400 for the first thing that is wrong with it."""
    if not isinstance(body, dict):
        raise ApiError(f"The body must be a JSON object, not {_json_type(body)}.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _explained(error, body) from None


def _explained(error: ValidationError, body: dict) -> ApiError:
    # Of a union's branches, pydantic reports each: the deepest one, or the one of the right type, was meant.
    places = [(_place(e["loc"], e["type"] == "missing", body), e) for e in error.errors(include_url=False)]
    (param, value), first = max(
        places, key=lambda p: (len(re.findall(r"[.[]", p[0][0])), p[1]["type"][-5:] != "_type")
    )
    kind, limits, shown = first["type"], first.get("ctx", {}), reprlib.repr(value)
    number = "decimal" if isinstance(limits.get("ge", limits.get("le")), float) else "integer"
    if kind == "missing":
        return ApiError(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if kind == "too_short":
        message = f"Invalid '{param}': empty array. Expected an array with minimum length 1."
        return ApiError(message, param=param, code="empty_array")
    if kind == "too_long":
        message = f"Invalid '{param}': array too long. Expected at most {limits['max_length']} elements."
        return ApiError(message, param=param, code="array_above_max_length")
    if kind == "greater_than_equal":
        message = (
            f"Invalid '{param}': {number} below minimum value, {shown}. Expected a value >= {limits['ge']}."
        )
        return ApiError(message, param=param, code=f"{number}_below_min_value")
    if kind == "less_than_equal":
        message = (
            f"Invalid '{param}': {number} above maximum value, {shown}. Expected a value <= {limits['le']}."
        )
        return ApiError(message, param=param, code=f"{number}_above_max_value")
    if kind in ("literal_error", "string_pattern_mismatch"):
        message = f"Invalid value for '{param}': {first['msg']}, not {shown}."
        return ApiError(message, param=param, code="invalid_value")
    message = f"Invalid type for '{param}': {first['msg']}, got {_json_type(value)}."
    return ApiError(message, param=param, code="invalid_type")


def _place(loc: tuple, missing: bool, body: Any) -> tuple[str, Any]:
    """The parameter's name in OpenAI's notation, such as messages[0].role, and the value found there.

    pydantic's path also names the branches of a union, such as `str` or `list[Part]`: they are no keys of the
    body.
    """
    name, value = "", body
    for step, part in enumerate(loc, 1):
        if isinstance(value, list) and isinstance(part, int):
            name, value = f"{name}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (missing and step == len(loc))):
            name, value = f"{name}.{part}" if name else part, value.get(part)
    return name, value


def _json_type(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")
