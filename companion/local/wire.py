"""What may come over the wire, and OpenAI's errors for what may not.

Requests are checked here, field by field, against https://platform.openai.com/docs/api-reference; a field that the
endpoint does not honour and that would change the answer is refused, one that would not is passed over.
"""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

Number = StrictInt | StrictFloat
AnyRequest = TypeVar("AnyRequest", bound="Request")


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
    content: StrictStr | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, ge=0, le=1)
    n: StrictInt | None = Field(default=None, ge=1, le=128)
    stop: StrictStr | list[StrictStr] | None = None
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1)
    presence_penalty: Number | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Number] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    seed: StrictInt | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class CompletionRequest(Request):
    """POST /v1/completions: the older API, where the prompt is text and not a conversation."""

    prompt: StrictStr
    stream: Literal[False] | None = None
    echo: StrictBool | None = None
    max_tokens: StrictInt | None = Field(default=None, ge=0)
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, ge=0, le=1)
    logprobs: StrictInt | None = Field(default=None, ge=0, le=100)
    stop: StrictStr | list[StrictStr] | None = None
    seed: StrictInt | None = None


class EmbeddingRequest(Request):
    """POST /v1/embeddings."""

    input: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
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


class ResponsesRequest(Request):
    """POST /v1/responses."""

    input: StrictStr | list[dict[str, Any]]
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    stream: StrictBool | None = None
    store: StrictBool | None = None
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, ge=0, le=1)
    max_output_tokens: StrictInt | None = Field(default=None, ge=1)
    text: TextOptions | None = None
    tools: list[ResponsesTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    metadata: dict[str, StrictStr] | None = None


def parse(kind: type[AnyRequest], body: Any) -> AnyRequest:
    """`body` as a request of this kind; raises ApiError 400 for the first thing that is wrong with it."""
    if not isinstance(body, dict):
        raise ApiError(f"The body must be a JSON object, not {_json_type(body)}.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _explained(error, body) from None


def _explained(error: ValidationError, body: dict) -> ApiError:
    # Of a union's branches, pydantic reports each: the deepest one is the branch that was meant.
    first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
    param, value = _place(first["loc"], body)
    if first["type"] == "missing":
        return ApiError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if first["type"] == "too_short":
        return ApiError(
            f"Invalid '{param}': empty array. Expected an array with minimum length 1.", param=param, code="empty_array"
        )
    if first["type"].startswith(("greater_than", "less_than", "too_long")):
        return ApiError(f"Invalid '{param}': {first['msg']}, not {value!r}.", param=param, code="invalid_value")
    if first["type"] in ("literal_error", "string_pattern_mismatch"):
        return ApiError(f"Invalid value for '{param}': {first['msg']}, not {value!r}.", param=param, code="invalid_value")
    return ApiError(
        f"Invalid type for '{param}': {first['msg']}, got {_json_type(value)}.", param=param, code="invalid_type"
    )


def _place(loc: tuple, body: Any) -> tuple[str, Any]:
    """The parameter's name in OpenAI's notation, such as messages[0].role, and the value found there."""
    name, value = "", body
    for part in loc:
        if isinstance(part, int) and isinstance(value, list):
            name, value = f"{name}[{part}]", value[part] if part < len(value) else None
        elif isinstance(part, str) and isinstance(value, dict) and (part in value or part == loc[-1]):
            name, value = f"{name}.{part}" if name else part, value.get(part)
    return name, value


def _json_type(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "null")
