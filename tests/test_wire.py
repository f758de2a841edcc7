"""What comes over the wire: read by type, and refused with the name, code and words of OpenAI's errors."""

import json
import math

import pytest

from companion.local.wire import (
    NESTING,
    ApiError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponsesRequest,
    decoded,
    parse,
)

HI = [{"role": "user", "content": "hi"}]
BODIES = {
    ChatRequest: {"model": "m", "messages": HI},
    CompletionRequest: {"model": "m", "prompt": "hi"},
    EmbeddingRequest: {"model": "m", "input": "hi"},
    ResponsesRequest: {"model": "m", "input": "hi"},
}
TOOL = {"type": "function", "function": {"name": "look_up"}}
JSON_TYPES = [
    (None, "null"),
    (True, "a boolean"),
    (5, "an integer"),
    (1.5, "a number"),
    ("text", "a string"),
    ([], "an array"),
    ({}, "an object"),
]


def refused(kind, body) -> dict:
    with pytest.raises(ApiError) as error:
        parse(kind, body)
    assert error.value.status == 400
    assert set(error.value.body) == {"error"}
    found = error.value.body["error"]
    assert found["type"] == "invalid_request_error"
    return found


# --- errors -------------------------------------------------------------------------------------------------


def test_an_error_is_a_bad_request_unless_it_says_otherwise():
    error = ApiError("No.")
    assert (str(error), error.status) == ("No.", 400)
    assert error.body == {
        "error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}
    }


def test_an_error_carries_what_it_was_given():
    error = ApiError("No.", status=503, type="server_error", param="model", code="away")
    assert error.status == 503
    assert error.body == {
        "error": {"message": "No.", "type": "server_error", "param": "model", "code": "away"}
    }


# --- JSON ---------------------------------------------------------------------------------------------------


def nest(times: int, opening: str, closing: str) -> bytes:
    """A number in so many brackets."""
    return f"{opening * times}1{closing * times}".encode()


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (' {"a": ["ü🙂", 1, -0.5, true, null]}\n'.encode(), {"a": ["ü🙂", 1, -0.5, True, None]}),
        (b"\xef\xbb\xbf{}", {}),
        (rb'"\ud83d\ude42 \u0000"', "🙂 \0"),
        (b"[]", []),
        (b"1e308", 1e308),
        (b"9" * 4000, 10**4000 - 1),
        (f"[{'[],' * 1000}{{}}]".encode(), [[]] * 1000 + [{}]),
    ],
    ids=["text", "byte order mark", "escapes", "no object", "large float", "large integer", "wide"],
)
def test_json_is_decoded(raw, value):
    assert decoded(raw) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b'{"a": 1,}',
        b"{} {}",
        b'"a\nb"',
        b"NaN",
        b"[Infinity]",
        b'{"a": -Infinity}',
        b"1e999",
        b"9" * 5000,
        b'"\xff"',
        b'"\xed\xa0\x80"',
        rb'"\ud83d"',
        rb'{"\ude42": 1}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
    ],
    ids=lambda raw: f"{raw[:20]!r} ({len(raw)})",
)
def test_what_is_no_json_is_refused(raw):
    with pytest.raises(ApiError) as error:
        decoded(raw)
    found = error.value.body["error"]
    assert error.value.status == 400
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", None, "invalid_json")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[0,{"a":1,"b":', "},[]]")])
def test_json_is_nested_up_to_the_limit(opening, closing):
    each = opening.count("[") + opening.count("{")
    whole = nest((NESTING - 1) // each, opening, closing)
    assert decoded(whole) == json.loads(whole)
    with pytest.raises(ApiError) as error:
        decoded(nest(math.ceil(NESTING / each), opening, closing))
    assert error.value.body["error"]["code"] == "invalid_json"


# --- requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "shown"), [pair for pair in JSON_TYPES if pair[0] != {}])
def test_a_body_that_is_no_object_is_refused_by_its_type(body, shown):
    found = refused(ChatRequest, body)
    assert found["message"] == f"The body must be a JSON object, not {shown}."
    assert (found["param"], found["code"]) == (None, None)


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_of_what_is_required_is_enough(kind):
    assert parse(kind, BODIES[kind]).model_dump(exclude_unset=True) == BODIES[kind]


@pytest.mark.parametrize("kind", BODIES)
def test_null_is_as_good_as_nothing(kind):
    nothing = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    assert nothing
    assert parse(kind, BODIES[kind] | nothing) == parse(kind, BODIES[kind])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BODIES for name in BODIES[kind]])
def test_what_is_missing_is_named(kind, name):
    found = refused(kind, {key: value for key, value in BODIES[kind].items() if key != name})
    assert found["message"] == f"Missing required parameter: '{name}'."
    assert (found["param"], found["code"]) == (name, "missing_required_parameter")


@pytest.mark.parametrize(("value", "shown"), [pair for pair in JSON_TYPES if pair[0] != "text"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_wrong_type_is_named_as_json_calls_it(kind, value, shown):
    found = refused(kind, BODIES[kind] | {"model": value})
    assert found["message"] == f"Invalid type for 'model': Input should be a valid string, got {shown}."
    assert (found["param"], found["code"]) == ("model", "invalid_type")


@pytest.mark.parametrize("kind", BODIES)
def test_unknown_fields_are_kept(kind):
    assert parse(kind, BODIES[kind] | {"later": {"a": [1]}}).model_extra == {"later": {"a": [1]}}


def test_unknown_fields_of_messages_and_parts_are_kept():
    part = {"type": "image_url", "image_url": {"url": "x"}}
    messages = [{"role": "user", "name": "Ada", "content": [part]}]
    asked = parse(ChatRequest, {"model": "m", "messages": messages})
    assert asked.messages[0].model_extra == {"name": "Ada"}
    assert asked.messages[0].content[0].model_extra == {"image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((ChatRequest, {"temperature": value}) for value in (0, 1, 2, 0.5)),
        *((ChatRequest, {"frequency_penalty": value}) for value in (-2, 2)),
        *((ChatRequest, {"logit_bias": {"5": value}}) for value in (-100, 100)),
        *((ChatRequest, {"n": value}) for value in (1, 128)),
        *((ChatRequest, {"max_tokens": value}) for value in (1, 2**31 - 1)),
        *((ChatRequest, {"top_logprobs": value}) for value in (0, 20)),
        (CompletionRequest, {"max_tokens": 0}),
        (ChatRequest, {"seed": -(2**70)}),
        *((ChatRequest, {"stop": value}) for value in (".", [".", "!"])),
        (ChatRequest, {"tools": [TOOL] * 128}),
        (ChatRequest, {"tools": [{"type": "function", "function": {"name": "a" * 64}}]}),
        *((ChatRequest, {"tool_choice": value}) for value in ("none", "auto", "required", TOOL)),
        *((EmbeddingRequest, {"input": value}) for value in (["a"], [1, 2], [[1], [2]])),
        (ResponsesRequest, {"input": [{"type": "message", "role": "user", "content": "hi"}]}),
        (ResponsesRequest, {"tool_choice": {"type": "function", "name": "look_up"}}),
    ],
)
def test_what_lies_within_the_limits_is_taken(kind, change):
    asked = parse(kind, BODIES[kind] | change).model_dump(exclude_unset=True)
    assert asked == BODIES[kind] | change


def test_a_schema_is_read_from_its_own_name():
    def schema(**given):
        form = {"type": "json_schema", "json_schema": {"name": "ticket"} | given}
        return parse(ChatRequest, BODIES[ChatRequest] | {"response_format": form}).response_format.json_schema

    assert schema(schema={"type": "array"}).schema_ == {"type": "array"}
    assert schema().schema_ == {"type": "object"}


@pytest.mark.parametrize(
    ("kind", "change", "param", "code", "told"),
    [
        (
            ChatRequest,
            {"temperature": 2.1},
            "temperature",
            "decimal_above_max_value",
            "2.1. Expected a value <= 2",
        ),
        (ChatRequest, {"top_p": -1}, "top_p", "decimal_below_min_value", "-1. Expected a value >= 0"),
        (ChatRequest, {"n": 0}, "n", "integer_below_min_value", "0. Expected a value >= 1"),
        (ChatRequest, {"n": 129}, "n", "integer_above_max_value", "129. Expected a value <= 128"),
        (ChatRequest, {"max_tokens": 2**31}, "max_tokens", "integer_above_max_value", "<= 2147483647"),
        (CompletionRequest, {"max_tokens": -1}, "max_tokens", "integer_below_min_value", ">= 0"),
        (ChatRequest, {"logit_bias": {"5": -101}}, "logit_bias.5", "decimal_below_min_value", ">= -100"),
        # No type stands in for another.
        (ChatRequest, {"temperature": "1"}, "temperature", "invalid_type", "number, got a string"),
        (ChatRequest, {"temperature": True}, "temperature", "invalid_type", "number, got a boolean"),
        (ChatRequest, {"n": True}, "n", "invalid_type", "integer, got a boolean"),
        (ChatRequest, {"n": 1.0}, "n", "invalid_type", "integer, got a number"),
        (ChatRequest, {"stream": 1}, "stream", "invalid_type", "boolean, got an integer"),
        (ChatRequest, {"stream": "true"}, "stream", "invalid_type", "boolean, got a string"),
        (ChatRequest, {"messages": {}}, "messages", "invalid_type", "list, got an object"),
        (ResponsesRequest, {"metadata": {"a": 1}}, "metadata.a", "invalid_type", "string, got an integer"),
        (ResponsesRequest, {"conversation": "x"}, "conversation", "invalid_type", "None, got a string"),
        # Lists.
        (ChatRequest, {"messages": []}, "messages", "empty_array", "minimum length 1"),
        (ResponsesRequest, {"input": []}, "input", "empty_array", "minimum length 1"),
        (ChatRequest, {"tools": [TOOL] * 129}, "tools", "array_above_max_length", "at most 128"),
        # Values.
        (CompletionRequest, {"n": 2}, "n", "invalid_value", "should be 1, not 2"),
        (CompletionRequest, {"stream": True}, "stream", "invalid_value", "should be False, not True"),
        (ResponsesRequest, {"truncation": "auto"}, "truncation", "invalid_value", "'disabled', not 'auto'"),
        (
            EmbeddingRequest,
            {"encoding_format": "hex"},
            "encoding_format",
            "invalid_value",
            "'base64', not 'hex'",
        ),
        # Places within.
        (ChatRequest, {"messages": [*HI, 5]}, "messages[1]", "invalid_type", "got an integer"),
        (
            ChatRequest,
            {"messages": [*HI, {"role": "robot"}]},
            "messages[1].role",
            "invalid_value",
            "not 'robot'",
        ),
        (ChatRequest, {"messages": [{}]}, "messages[0].role", "missing_required_parameter", "[0].role'"),
        (
            ChatRequest,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "b"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "missing_required_parameter",
            "arguments",
        ),
        (
            ChatRequest,
            {"tools": [TOOL, {"type": "function", "function": {"name": "a\n"}}]},
            "tools[1].function.name",
            "invalid_value",
            r"not 'a\n'",
        ),
        (
            ChatRequest,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}},
            "response_format.json_schema.schema",
            "invalid_type",
            "dictionary, got an integer",
        ),
        (
            ResponsesRequest,
            {"text": {"format": {}}},
            "text.format.type",
            "missing_required_parameter",
            "type",
        ),
        # Unions: the branch that was meant is told of, and no branch is named.
        (ChatRequest, {"stop": 5}, "stop", "invalid_type", "got an integer"),
        (ChatRequest, {"stop": ["a", 5]}, "stop[1]", "invalid_type", "string, got an integer"),
        (ChatRequest, {"tool_choice": "maybe"}, "tool_choice", "invalid_value", "not 'maybe'"),
        (
            ChatRequest,
            {"tool_choice": {"type": "x"}},
            "tool_choice.type",
            "invalid_value",
            "'function', not 'x'",
        ),
        (
            ChatRequest,
            {"tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
            "missing_required_parameter",
            "name",
        ),
        (
            ResponsesRequest,
            {"tool_choice": {"type": "function"}},
            "tool_choice.name",
            "missing_required_parameter",
            "name",
        ),
        *(
            (kind, {field: [{"role": "user", "content": content}]}, f"{field}[0].content{at}", code, told)
            for kind, field in ((ChatRequest, "messages"), (ResponsesRequest, "input"))
            for content, at, code, told in (
                (5, "", "invalid_type", "got an integer"),
                ({}, "", "invalid_type", "got an object"),
                ([], "", "empty_array", "minimum length 1"),
                (["a"], "[0]", "invalid_type", "got a string"),
                ([{"text": "a"}], "[0].type", "missing_required_parameter", "type"),
                ([{"type": "text", "text": 5}], "[0].text", "invalid_type", "string, got an integer"),
            )
        ),
        (EmbeddingRequest, {"input": {}}, "input", "invalid_type", "got an object"),
        (EmbeddingRequest, {"input": ["a", 5]}, "input[1]", "invalid_type", "string, got an integer"),
        (EmbeddingRequest, {"input": [[1, "a"]]}, "input[0][1]", "invalid_type", "integer, got a string"),
    ],
)
def test_what_is_wrong_is_named(kind, change, param, code, told):
    found = refused(kind, BODIES[kind] | change)
    assert (found["param"], found["code"]) == (param, code)
    assert f"'{param}'" in found["message"]
    assert told in found["message"]


@pytest.mark.parametrize(
    "change", [{"max_tokens": 10**4000}, {"tools": [{"type": "x" * 10_000, "function": {"name": "a"}}]}]
)
def test_a_long_value_is_not_told_in_full(change):
    message = refused(ChatRequest, BODIES[ChatRequest] | change)["message"]
    assert "..." in message
    assert len(message) < 200
