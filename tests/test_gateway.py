"""The endpoint as the openai SDK sees it: every route and option, read by the SDK's own types, strictly."""

import asyncio
import base64
import json
import math
import random
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import InputTokenCountResponse, Response, ResponseStreamEvent
from pydantic import TypeAdapter

from companion.backend import CHAT_MODEL, EMBEDDING_MODEL
from companion.local import completions, gateway, process
from companion.local.store import StoreError

HI = [{"role": "user", "content": "Say hello."}]
SCHEMA = {
    "type": "object",
    "properties": {"intent": {"enum": ["refund", "delivery"]}, "urgent": {"type": "boolean"}},
    "required": ["intent", "urgent"],
    "additionalProperties": False,
}
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up_order",
        "description": "The state of an order.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 999}},
            "required": ["number"],
        },
    },
}
WEATHER = {"type": "function", "function": {"name": "weather"}}
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def http(client):
    """The endpoint without the SDK: for what the SDK would not send."""
    headers = {"authorization": f"Bearer {client.api_key}"}
    with httpx.Client(base_url=str(client.base_url), headers=headers, timeout=120, trust_env=False) as http:
        yield http


@pytest.fixture
def own_app(tmp_path, monkeypatch):
    """The application without its server, in a home of its own; its token is "a-token"."""
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    return gateway.create_app("a-token")


def chat(client, messages=HI, **options) -> ChatCompletion:
    raw = client.chat.completions.with_raw_response.create(
        **({"model": CHAT_MODEL, "messages": messages, "max_tokens": 8, "temperature": 0} | options)
    )
    return ChatCompletion.model_validate(json.loads(raw.text), strict=True)


def chunks(client, messages=HI, **options) -> list[ChatCompletionChunk]:
    asked = {"model": CHAT_MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, "stream": True}
    with client.chat.completions.with_streaming_response.create(**(asked | options)) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        events = [line[6:] for line in raw.iter_lines() if line]
    assert events.pop() == "[DONE]"
    return [ChatCompletionChunk.model_validate(json.loads(event), strict=True) for event in events]


def text(found: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in found for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def respond(client, asked="Say hello.", **options) -> Response:
    raw = client.responses.with_raw_response.create(
        **({"model": CHAT_MODEL, "input": asked, "max_output_tokens": 8, "temperature": 0} | options)
    )
    return Response.model_validate(json.loads(raw.text), strict=True)


def events(http, asked="Say hello.", **options) -> list:
    body = {"model": CHAT_MODEL, "input": asked, "max_output_tokens": 8, "temperature": 0, "stream": True}
    lines = http.post("/responses", json=body | options).text.splitlines()
    names = [line[7:] for line in lines if line.startswith("event: ")]
    found = [
        EVENT.validate_python(json.loads(line[6:]), strict=True) for line in lines if line[:6] == "data: "
    ]
    assert names == [event.type for event in found]
    return found


# --- models -------------------------------------------------------------------------------------------------


def test_models_are_listed_and_retrieved(client):
    listed = json.loads(client.models.with_raw_response.list().text)
    assert listed["object"] == "list"
    assert {Model.model_validate(m, strict=True).id for m in listed["data"]} == {CHAT_MODEL, EMBEDDING_MODEL}
    assert client.models.retrieve(CHAT_MODEL).id == CHAT_MODEL


def test_a_model_of_the_course_cannot_be_deleted(client):
    with pytest.raises(openai.PermissionDeniedError) as refused:
        client.models.delete(CHAT_MODEL)
    assert refused.value.code == "model_not_deletable"
    with pytest.raises(openai.NotFoundError):
        client.models.delete("gpt-9")


# --- chat completions ---------------------------------------------------------------------------------------


def test_a_chat_is_answered(client):
    found = chat(client)
    assert found.object == "chat.completion"
    assert found.model == CHAT_MODEL
    assert found.choices[0].message.content
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert 1 <= found.usage.completion_tokens <= 8


def test_a_streamed_chat_says_what_the_whole_one_says(client):
    found = chunks(client)
    assert text(found) == chat(client).choices[0].message.content
    assert found[0].choices[0].delta.role == "assistant"
    assert found[-1].choices[0].finish_reason in ("stop", "length")
    assert len({chunk.id for chunk in found}) == 1
    assert all(chunk.usage is None for chunk in found)


def test_the_first_piece_of_a_stream_names_its_role_even_where_it_is_several_tokens(client):
    found = chunks(client, [{"role": "user", "content": 'Say "hi" and 🙂'}], logit_bias={"249": 100})
    roles = [choice.delta.role for chunk in found for choice in chunk.choices]
    assert roles[0] == "assistant"
    assert not any(roles[1:])


def test_pieces_of_text_that_come_quickly_come_together(monkeypatch):
    def event(delta: dict, **more) -> bytes:
        choice = {"finish_reason": None, "index": 0, "delta": delta, **more}
        said = {"choices": [choice], "created": 5, "id": "a", "object": "chat.completion.chunk"}
        return b"data: " + json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    pieces = ["Hel", 'lo "]}}],"created":9', " \\", "", "🧗\n", "\0end"]
    scored = [event({"content": piece}, logprobs={"content": []}) for piece in "ab"]

    async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        writer.write(event({"role": "assistant", "content": None}) + event({"content": "At once."}))
        await asyncio.sleep(0.05)
        for piece in pieces:
            writer.write(event({"content": piece}))
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.6)
        writer.write(b"".join(scored) + b"data: [DONE]\n\n")
        writer.close()

    async def read() -> tuple[list, list]:
        server = await asyncio.start_server(write, "127.0.0.1")
        port = server.sockets[0].getsockname()[1]
        engine = SimpleNamespace(address=f"http://127.0.0.1:{port}", headers={})
        upstream, found, at = completions.Upstream(), [], []
        async with server, upstream.stream(engine, {}) as events:
            async for data in events:
                found.append(json.loads(data)["choices"][0])
                at.append(asyncio.get_running_loop().time())
        await upstream.close()
        return found, at

    monkeypatch.setattr(completions, "PAUSE", 0.5)
    monkeypatch.setattr(completions, "LONGEST_PAUSE", 0.5)
    found, at = asyncio.run(read())
    assert [choice["delta"]["content"] for choice in found] == [None, "At once.", "".join(pieces), "a", "b"]
    assert ["logprobs" in choice for choice in found] == [False] * 3 + [True] * 2
    assert at[1] - at[0] < 0.3 < at[2] - at[1]


def test_a_stream_reports_its_usage_when_asked(client):
    found = chunks(client, stream_options={"include_usage": True}, max_tokens=4)
    assert found[-1].choices == []
    assert found[-1].usage.completion_tokens == 4
    assert found[-1].usage.prompt_tokens == chat(client, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize("streamed", [False, True])
def test_n_answers_come_with_an_index_each(client, streamed):
    options = {"n": 3, "max_tokens": 3, "temperature": 1.0, "seed": 7}
    if streamed:
        found = chunks(client, **options, stream_options={"include_usage": True})
        texts = [text(found, index) for index in range(3)]
        assert found[-1].usage.completion_tokens <= 9
        assert len({chunk.id for chunk in found}) == 1
    else:
        whole = chat(client, **options)
        texts = [choice.message.content for choice in whole.choices]
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert whole.usage.prompt_tokens == chat(client, max_tokens=1).usage.prompt_tokens
    assert all(texts)
    assert len(set(texts)) > 1


@pytest.mark.slow
def test_more_streamed_answers_than_fit_side_by_side_all_come(client):
    found = chunks(client, n=12, max_tokens=1024, stop=[" "], temperature=1.0)
    finished = [choice.index for chunk in found for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == list(range(12))


def test_the_same_seed_gives_the_same_text(client):
    def said(seed):
        return chat(client, temperature=1.5, seed=seed, max_tokens=12).choices[0].message.content

    assert said(11) == said(11)
    assert len({said(seed) for seed in range(4)}) > 1


def test_temperature_zero_gives_the_same_text(client):
    assert len({chat(client).choices[0].message.content for _ in range(3)}) == 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_ends_the_answer(client, name):
    found = chat(client, **{"max_tokens": openai.omit, name: 3})
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 3


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("stop", ["e", ["nothing", "e"]])
def test_a_stop_sequence_ends_the_answer_and_is_left_out(client, stop, streamed):
    messages = [{"role": "user", "content": "Say hello."}]
    options = {"stop": stop, "max_tokens": 40, "logit_bias": {"2": -100}}
    if streamed:
        found = chunks(client, messages, **options)
        said, reason = text(found), found[-1].choices[0].finish_reason
    else:
        choice = chat(client, messages, **options).choices[0]
        said, reason = choice.message.content, choice.finish_reason
    assert reason == "stop"
    assert "e" not in said


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_are_probabilities_from_the_likeliest_down(client, streamed):
    options = {"logprobs": True, "top_logprobs": 5, "max_tokens": 4}
    if streamed:
        choices = [choice for chunk in chunks(client, **options) for choice in chunk.choices]
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    else:
        tokens = chat(client, **options).choices[0].logprobs.content
    assert len(tokens) == 4
    for token in tokens:
        top = [other.logprob for other in token.top_logprobs]
        assert len(top) == 5
        assert top == sorted(top, reverse=True)
        assert sum(map(math.exp, top)) <= 1 + 1e-6
        assert token.logprob == top[0]  # at temperature 0 the likeliest is taken
        assert bytes(token.bytes).decode(errors="replace") == token.token


def test_logprobs_without_top_logprobs_have_no_alternatives(client):
    tokens = chat(client, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [token.top_logprobs for token in tokens] == [[], []]


def test_logit_bias_forbids_and_forces_a_token(client):
    forced = chat(client, logit_bias={"30": 100}, max_tokens=4).choices[0].message.content
    assert len(forced) == 4
    assert len(set(forced)) == 1
    ended = chat(client, max_tokens=80, logit_bias={"2": 100}).choices[0]  # 2 is the end of a message
    assert (ended.finish_reason, ended.message.content) == ("stop", "")
    endless = chat(client, max_tokens=80, logit_bias={"2": -100}).choices[0]
    assert endless.finish_reason == "length"


def test_a_frequency_penalty_makes_the_text_repeat_less(client):
    messages = [{"role": "user", "content": "Repeat: go go go go go go go go go go"}]

    def variety(**options):
        found = chat(client, messages, max_tokens=24, logit_bias={"2": -100}, **options)
        words = found.choices[0].message.content.split()
        return len(set(words)) / len(words)

    assert variety(frequency_penalty=2, presence_penalty=2) > variety()


@pytest.mark.parametrize("streamed", [False, True])
def test_json_object_gives_an_object(client, streamed):
    messages = [{"role": "user", "content": "Write JSON with the key a."}]
    options = {"response_format": {"type": "json_object"}, "max_tokens": 60, "stop": ["}"], "temperature": 0}
    if streamed:
        said = text(chunks(client, messages, **options))
    else:
        said = chat(client, messages, **options).choices[0].message.content
    assert said.startswith("{")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_strict_schema_is_obeyed(client, seed, streamed):
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": SCHEMA, "strict": True}}
    options = {"response_format": form, "max_tokens": 40, "temperature": 1.5, "seed": seed}
    said = text(chunks(client, **options)) if streamed else chat(client, **options).choices[0].message.content
    found = json.loads(said)
    assert list(found) == ["intent", "urgent"]
    assert found["intent"] in ("refund", "delivery")
    assert isinstance(found["urgent"], bool)


def test_the_sdks_own_parse_reads_a_pydantic_model(client):
    from pydantic import BaseModel

    class Address(BaseModel):
        floor: bool

    class Ticket(BaseModel):
        urgent: bool
        address: Address

    found = client.chat.completions.parse(
        model=CHAT_MODEL, messages=HI, response_format=Ticket, max_tokens=60, temperature=0
    )
    assert isinstance(found.choices[0].message.parsed.address, Address)


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, "additionalProperties"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, "required"),
        (
            {"type": "object", "properties": {"a": {}}, "required": 5, "additionalProperties": False},
            "required",
        ),
        ({**SCHEMA, "properties": {**SCHEMA["properties"], "urgent": {"type": "object"}}}, "urgent"),
        ({"type": "strin"}, "strin"),
        ({"type": 5}, "type"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "#"}, "no text"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "array", "minItems": 10**12}, "10000"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(client, schema, word):
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match=word) as refused:
        chat(client, response_format=form)
    assert (refused.value.param, refused.value.code) == ("response_format", "invalid_json_schema")


# --- tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"look_up_order", "weather"}),
        ({"type": "function", "function": {"name": "look_up_order"}}, {"look_up_order"}),
    ],
)
def test_a_forced_call_parses(client, choice, names, streamed):
    options = {
        "tools": [LOOK_UP, WEATHER],
        "tool_choice": choice,
        "max_tokens": 60,
        "temperature": 1.5,
        "seed": 3,
    }
    if streamed:
        found = chunks(client, **options)
        calls = [call for chunk in found for c in chunk.choices for call in c.delta.tool_calls or []]
        reason, said = found[-1].choices[0].finish_reason, text(found)
        assert {call.index for call in calls} == {0}
    else:
        message = chat(client, **options).choices[0]
        calls, reason, said = message.message.tool_calls, message.finish_reason, message.message.content
    assert reason == "tool_calls"
    assert not said
    assert len(calls) == 1
    assert calls[0].function.name in names
    assert isinstance(json.loads(calls[0].function.arguments), dict)
    if calls[0].function.name == "look_up_order":
        assert 1 <= json.loads(calls[0].function.arguments)["number"] <= 999


@pytest.mark.parametrize("options", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_free_choice_gives_words_or_a_call(client, options, streamed):
    options = {"tools": [LOOK_UP], "max_tokens": 40, **options}
    if streamed:
        found = chunks(client, **options)
        calls = [call for chunk in found for c in chunk.choices for call in c.delta.tool_calls or []]
        said = text(found)
    else:
        message = chat(client, **options).choices[0].message
        calls, said = message.tool_calls or [], message.content
    assert bool(calls) != bool(said)
    if options.get("tool_choice") == "none":
        assert not calls


@pytest.mark.parametrize("streamed", [False, True])
def test_half_a_call_is_neither_a_call_nor_text(client, streamed):
    options = {"tools": [LOOK_UP], "tool_choice": "required", "max_tokens": 3}
    if streamed:
        found = chunks(client, **options)
        assert not text(found)
        assert found[-1].choices[0].finish_reason == "length"
        assert not any(choice.delta.tool_calls for chunk in found for choice in chunk.choices)
    else:
        choice = chat(client, **options).choices[0]
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == (
            "length",
            None,
            None,
        )


def test_a_tool_with_definitions_is_called(client):
    from pydantic import BaseModel

    class Line(BaseModel):
        amount: bool

    class Basket(BaseModel):
        first: Line
        second: Line

    tool = openai.pydantic_function_tool(Basket)
    found = chat(
        client,
        tools=[WEATHER, tool],
        tool_choice={"type": "function", "function": {"name": "Basket"}},
        max_tokens=80,
    )
    Basket.model_validate_json(found.choices[0].message.tool_calls[0].function.arguments)


def test_a_tool_result_is_read(client):
    call = chat(client, tools=[LOOK_UP], tool_choice="required", max_tokens=60).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "shipped"}
    answered = chat(
        client, [*HI, call.model_dump(exclude_none=True), result], tools=[LOOK_UP], tool_choice="none"
    )
    assert answered.choices[0].message.content
    without = chat(client, HI, tools=[LOOK_UP], tool_choice="none")
    assert answered.usage.prompt_tokens > without.usage.prompt_tokens + 10


# --- responses ----------------------------------------------------------------------------------------------


def test_a_response_is_text(client):
    found = respond(client)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.output_text == chat(client).choices[0].message.content
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


def test_a_response_goes_on_from_the_last_one_without_its_instructions(client):
    first = respond(client, instructions="Answer in French, in one word.")
    second = respond(client, "And again.", previous_response_id=first.id)
    messages = [
        *HI,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And again."},
    ]
    assert second.output_text == chat(client, messages).choices[0].message.content
    assert second.previous_response_id == first.id
    with_system = chat(client, [{"role": "system", "content": "Answer in French, in one word."}, *HI])
    assert first.output_text == with_system.choices[0].message.content


def test_a_response_that_was_not_stored_is_not_found(client):
    first = respond(client, store=False)
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, previous_response_id=first.id)
    assert (refused.value.param, refused.value.code) == (
        "previous_response_id",
        "previous_response_not_found",
    )


def test_a_response_calls_a_function_and_reads_its_output(client):
    tool = {"type": "function", **LOOK_UP["function"]}
    first = respond(client, tools=[tool], tool_choice="required", max_output_tokens=60)
    call = first.output[0]
    assert (call.type, call.name, first.status) == ("function_call", "look_up_order", "completed")
    assert "number" in json.loads(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "shipped"}
    after = respond(client, [output], previous_response_id=first.id, tools=[tool], tool_choice="none")
    again = [{"role": "user", "content": "Say hello."}, call.model_dump(exclude_none=True), output]
    assert after.output_text == respond(client, again, tools=[tool], tool_choice="none").output_text


def test_a_response_keeps_to_a_schema(client):
    form = {"type": "json_schema", "name": "ticket", "schema": SCHEMA, "strict": True}
    found = respond(client, text={"format": form}, max_output_tokens=40)
    assert json.loads(found.output_text)["intent"] in ("refund", "delivery")
    assert found.text.format.name == "ticket"


def test_a_streamed_response_has_its_events_in_order(client, http):
    found = events(http)
    kinds = [event.type for event in found]
    first, last = (
        kinds.index("response.output_text.delta"),
        len(kinds) - kinds[::-1].index("response.output_text.delta"),
    )
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert kinds[:first] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[last:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    said = "".join(event.delta for event in found[first:last])
    assert said == found[last].text == found[-1].response.output_text == respond(client).output_text
    assert found[-1].response.usage.output_tokens == 8


def test_an_empty_streamed_response_is_a_message_too(http):
    kinds = [
        event.type
        for event in events(
            http,
            tools=[{"type": "function", **LOOK_UP["function"]}],
            tool_choice="required",
            max_output_tokens=2,
        )
    ]
    assert kinds.index("response.output_item.added") < kinds.index("response.output_item.done")
    assert kinds[-1] == "response.incomplete"


def test_a_streamed_response_calls_a_function(client, http):
    tool = {"type": "function", **LOOK_UP["function"]}
    found = events(http, tools=[tool], tool_choice="required", max_output_tokens=60)
    assert [event.type for event in found[2:]] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    call = found[-1].response.output[0]
    assert found[4].arguments == found[3].delta == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "shipped"}
    assert respond(client, [output], previous_response_id=found[-1].response.id).output_text


@pytest.mark.parametrize(
    "asked",
    [
        {"input": "Hello, Anna! 🧗 <|im_end|>"},
        {"input": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}] * 3},
        {"input": "Hi", "instructions": "Answer in one word."},
        {"input": "Hi", "tools": [{"type": "function"} | LOOK_UP["function"]]},
    ],
    ids=["text", "messages", "instructions", "tools"],
)
def test_counted_input_tokens_are_those_of_the_answers_usage(client, asked):
    raw = client.responses.input_tokens.with_raw_response.count(model=CHAT_MODEL, **asked)
    counted = InputTokenCountResponse.model_validate(json.loads(raw.text), strict=True)
    assert counted.input_tokens == respond(client, **{"asked": asked.pop("input")} | asked).usage.input_tokens


def test_the_input_tokens_of_what_would_be_refused_are_not_counted(client):
    before = respond(client)
    counted = client.responses.input_tokens.count(
        model=CHAT_MODEL, input="And again.", previous_response_id=before.id
    )
    assert counted.input_tokens > before.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.input_tokens.count(model="gpt-9", input="Hi")
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.input_tokens.count(model=CHAT_MODEL, input=[{"role": "user", "content": []}])
    assert refused.value.param == "input[0].content"


# --- embeddings and text completions ------------------------------------------------------------------------


def embed(client, asked, **options) -> CreateEmbeddingResponse:
    options = {"encoding_format": "float", **options}
    raw = client.embeddings.with_raw_response.create(model=EMBEDDING_MODEL, input=asked, **options)
    return CreateEmbeddingResponse.model_validate(json.loads(raw.text), strict=True)


def test_a_text_gets_the_same_numbers_alone_and_beside_others(client):
    texts = [f"{word} is what I ordered, and it has not come" for word in ("a tent", "a stove", "one mug")]
    alone = [embed(client, text).data[0].embedding for text in texts]
    together = [item.embedding for item in embed(client, texts).data]
    with ThreadPoolExecutor(6) as pool:
        others = pool.map(lambda n: embed(client, "other words " * n), range(1, 40))
        beside = list(pool.map(lambda n: embed(client, [texts[n % 3], f"{n}"]).data[0].embedding, range(12)))
        list(others)
    assert alone == together
    assert beside == alone * 4


def test_what_was_embedded_lately_is_not_computed_again(monkeypatch):
    computed = []

    async def post(self, engine, route, body):
        computed.append(body["input"])
        return {"data": [{"index": 0, "embedding": "x" * 400}], "usage": {"prompt_tokens": 7}}

    monkeypatch.setattr(completions.Upstream, "post", post)
    monkeypatch.setattr(completions, "KEPT", 2000)
    upstream, engine = completions.Upstream(), SimpleNamespace(address="http://127.0.0.1:9")

    async def ask(texts):
        answers = [
            await upstream.post_once(engine, "/v1/embeddings", {"input": [text]}) for text in texts.split()
        ]
        assert all(answer["usage"] == {"prompt_tokens": 7} for answer in answers)
        answers[0].clear()  # what is done to an answer changes no later one

    with ThreadPoolExecutor(1) as pool:  # another test may have left a loop running here
        pool.submit(asyncio.run, ask("a b a a b c a d a b")).result()
    assert computed == [["a"], ["b"], ["c"], ["d"], ["b"]]


def test_embeddings_have_unit_length_and_keep_their_order(client):
    both = embed(client, ["my parcel", "a tent"])
    assert [item.index for item in both.data] == [0, 1]
    for item, asked in zip(both.data, ("my parcel", "a tent"), strict=True):
        assert len(item.embedding) == 384
        assert math.isclose(sum(x * x for x in item.embedding), 1, abs_tol=1e-4)
        alone = embed(client, asked).data[0].embedding
        assert sum(a * b for a, b in zip(item.embedding, alone, strict=True)) > 0.999
    assert both.usage.prompt_tokens == both.usage.total_tokens > 4


def test_what_means_alike_is_near(client):
    parcel, order, tent = (
        item.embedding
        for item in embed(client, ["Where is my parcel?", "Track my order", "A tent for two"]).data
    )

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(parcel, order) > cosine(parcel, tent) + 0.1


def test_base64_carries_the_same_floats(client):
    raw = client.embeddings.with_raw_response.create(
        model=EMBEDDING_MODEL, input="a tent", encoding_format="base64"
    )
    packed = json.loads(raw.text)["data"][0]["embedding"]
    floats = struct.unpack("<384f", base64.b64decode(packed))
    assert floats == pytest.approx(embed(client, "a tent").data[0].embedding, abs=1e-6)
    unpacked = client.embeddings.create(model=EMBEDDING_MODEL, input="a tent").data[0].embedding
    assert unpacked == pytest.approx(floats, abs=1e-6)


def test_token_ids_can_be_embedded(client):
    one, two = embed(client, [101, 9311, 102]), embed(client, [[101, 9311, 102], [101, 2344, 102]])
    assert one.data[0].embedding == pytest.approx(two.data[0].embedding, abs=1e-4)
    assert len(two.data) == 2


def complete(client, **options) -> Completion:
    asked = {"model": CHAT_MODEL, "prompt": "The sun rises in the", "max_tokens": 3, "temperature": 0}
    raw = client.completions.with_raw_response.create(**(asked | options))
    return Completion.model_validate(json.loads(raw.text), strict=True)


def test_a_text_is_continued(client):
    found = complete(client)
    assert found.choices[0].text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 3


def test_a_continued_text_has_its_logprobs(client):
    choice = complete(client, logprobs=4).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset[0] == len("The sun rises in the")
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 4
        assert top[token] == logprob == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6


@pytest.mark.parametrize("prompt", ["Where is my order?", "naïve 🙂 café", ""])
def test_echo_cuts_a_prompt_into_its_tokens(client, prompt):
    choice = complete(client, prompt=prompt, echo=True, max_tokens=0, logprobs=0).choices[0]
    assert choice.text == prompt
    data = b""
    for token in choice.logprobs.tokens:
        data += bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
    assert data.decode() == prompt
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)


def test_the_async_client_works_too(client):
    async def several():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as other:
            whole = other.chat.completions.create(model=CHAT_MODEL, messages=HI, max_tokens=4, temperature=0)
            vectors = other.embeddings.create(model=EMBEDDING_MODEL, input="a tent")
            stream = await other.chat.completions.create(
                model=CHAT_MODEL, messages=HI, max_tokens=4, temperature=0, stream=True
            )
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return said, (await whole).choices[0].message.content, len((await vectors).data[0].embedding)

    streamed, whole, size = asyncio.run(several())
    assert streamed == whole
    assert size == 384


# --- what it must withstand ---------------------------------------------------------------------------------


def refused(reply: httpx.Response, status: int = 400) -> dict:
    """The error of a reply in OpenAI's form."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


ROUTES = {
    "/chat/completions": {"model": CHAT_MODEL, "messages": HI, "max_tokens": 2},
    "/responses": {"model": CHAT_MODEL, "input": "Say hello.", "max_output_tokens": 2},
    "/completions": {"model": CHAT_MODEL, "prompt": "Say", "max_tokens": 2},
    "/embeddings": {"model": EMBEDDING_MODEL, "input": "a tent"},
}
MISSING = object()
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
BAD = [
    *((route, {"model": MISSING}, "model", "missing_required_parameter") for route in ROUTES),
    *((route, {"model": 5}, "model", "invalid_type") for route in ROUTES),
    *((route, {"model": None}, "model", "invalid_type") for route in ROUTES),
    ("/chat/completions", {"model": EMBEDDING_MODEL}, "model", "model_not_supported"),
    ("/embeddings", {"model": CHAT_MODEL}, "model", "model_not_supported"),
    ("/chat/completions", {"messages": MISSING}, "messages", "missing_required_parameter"),
    ("/chat/completions", {"messages": []}, "messages", "empty_array"),
    ("/chat/completions", {"messages": "hi"}, "messages", "invalid_type"),
    ("/chat/completions", {"messages": ["hi"]}, "messages[0]", "invalid_type"),
    (
        "/chat/completions",
        {"messages": [{"content": "hi"}]},
        "messages[0].role",
        "missing_required_parameter",
    ),
    (
        "/chat/completions",
        {"messages": [{"role": "robot", "content": "hi"}]},
        "messages[0].role",
        "invalid_value",
    ),
    ("/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        "invalid_type",
    ),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        "messages[0].content",
        "invalid_type",
    ),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": []}]},
        "messages[0].content",
        "empty_array",
    ),
    (
        "/chat/completions",
        {"messages": [*HI, {"role": "user", "content": [{"text": "a"}]}]},
        "messages[1].content[0].type",
        "missing_required_parameter",
    ),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (
        "/chat/completions",
        {"messages": [{"role": "user", "content": "x " * 9000}]},
        "messages",
        "context_length_exceeded",
    ),
    (
        "/chat/completions",
        {"messages": [{"role": "tool", "tool_call_id": "call_1", "content": "a"}]},
        "messages[0].tool_call_id",
        "invalid_value",
    ),
    (
        "/chat/completions",
        {"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}, *HI]},
        "messages",
        "invalid_value",
    ),
    (
        "/chat/completions",
        {"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}]},
        "messages",
        "invalid_value",
    ),
    ("/chat/completions", {"temperature": "hot"}, "temperature", "invalid_type"),
    ("/chat/completions", {"temperature": 3}, "temperature", "decimal_above_max_value"),
    ("/chat/completions", {"temperature": -1}, "temperature", "decimal_below_min_value"),
    ("/chat/completions", {"temperature": True}, "temperature", "invalid_type"),
    ("/chat/completions", {"top_p": 1.5}, "top_p", "decimal_above_max_value"),
    ("/chat/completions", {"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ("/chat/completions", {"max_tokens": -5}, "max_tokens", "integer_below_min_value"),
    ("/chat/completions", {"max_tokens": 10**30}, "max_tokens", "integer_above_max_value"),
    ("/chat/completions", {"max_tokens": 2.5}, "max_tokens", "invalid_type"),
    ("/chat/completions", {"n": 0}, "n", "integer_below_min_value"),
    ("/chat/completions", {"n": 129}, "n", "integer_above_max_value"),
    ("/chat/completions", {"seed": "7"}, "seed", "invalid_type"),
    ("/chat/completions", {"stream": "yes"}, "stream", "invalid_type"),
    ("/chat/completions", {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ("/chat/completions", {"stop": {}}, "stop", "invalid_type"),
    ("/chat/completions", {"stop": ["a", 5]}, "stop[1]", "invalid_type"),
    ("/chat/completions", {"stop": ["a"] * 5}, "stop", "array_above_max_length"),
    ("/chat/completions", {"stop": ""}, "stop", "invalid_value"),
    ("/chat/completions", {"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ("/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ("/chat/completions", {"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
    ("/chat/completions", {"logit_bias": {"²": 1}}, "logit_bias", "invalid_value"),
    ("/chat/completions", {"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
    ("/chat/completions", {"logit_bias": [5]}, "logit_bias", "invalid_type"),
    ("/chat/completions", {"presence_penalty": 3}, "presence_penalty", "decimal_above_max_value"),
    ("/chat/completions", {"functions": []}, "functions", "unsupported_parameter"),
    ("/chat/completions", {"response_format": "json"}, "response_format", "invalid_type"),
    ("/chat/completions", {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (
        "/chat/completions",
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    (
        "/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "response_format.json_schema.name",
        "invalid_value",
    ),
    (
        "/chat/completions",
        {"response_format": {"type": "json_object"}, "tools": [WEATHER]},
        "response_format",
        "unsupported_parameter",
    ),
    (
        "/chat/completions",
        {"tools": [{"type": "function"}]},
        "tools[0].function",
        "missing_required_parameter",
    ),
    (
        "/chat/completions",
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        "invalid_value",
    ),
    ("/chat/completions", {"tools": [WEATHER] * 129}, "tools", "array_above_max_length"),
    (
        "/chat/completions",
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
        "tools",
        "invalid_function_parameters",
    ),
    (
        "/chat/completions",
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "a", "parameters": {"properties": {"b": {"type": "nothing"}}}},
                }
            ]
        },
        "tools",
        "invalid_function_parameters",
    ),
    (
        "/chat/completions",
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "a",
                        "strict": True,
                        "parameters": {"type": "object", "properties": {"b": {}}},
                    },
                }
            ]
        },
        "tools",
        "invalid_function_parameters",
    ),
    ("/chat/completions", {"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ("/chat/completions", {"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice", "invalid_value"),
    (
        "/chat/completions",
        {"tools": [WEATHER], "tool_choice": {"type": "function"}},
        "tool_choice.function",
        "missing_required_parameter",
    ),
    (
        "/chat/completions",
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "no"}}},
        "tool_choice",
        "invalid_value",
    ),
    ("/responses", {"input": MISSING}, "input", "missing_required_parameter"),
    ("/responses", {"input": []}, "input", "empty_array"),
    ("/responses", {"input": 5}, "input", "invalid_type"),
    ("/responses", {"input": [5]}, "input[0]", "invalid_type"),
    ("/responses", {"input": [{"role": "robot", "content": "a"}]}, "input[0].role", "invalid_value"),
    ("/responses", {"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
    ("/responses", {"input": [{"type": "reasoning"}]}, "input[0].type", "invalid_value"),
    (
        "/responses",
        {"input": [{"type": "function_call", "call_id": "a"}]},
        "input[0].name",
        "missing_required_parameter",
    ),
    (
        "/responses",
        {
            "instructions": "Be brief.",
            "input": [*HI, {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
        },
        "input[1].content[0].type",
        "invalid_value",
    ),
    (
        "/responses",
        {"input": [*HI, {"type": "function_call_output", "call_id": "a", "output": "b"}]},
        "input[1].call_id",
        "invalid_value",
    ),
    ("/responses", {"input": "x " * 9000}, "input", "context_length_exceeded"),
    ("/responses", {"previous_response_id": "resp_0"}, "previous_response_id", "previous_response_not_found"),
    ("/responses", {"background": True}, "background", "invalid_value"),
    ("/responses", {"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
    ("/responses", {"tools": [{"type": "web_search"}]}, "tools[0].name", "missing_required_parameter"),
    (
        "/responses",
        {"text": {"format": {"type": "json_schema"}}},
        "text.format.name",
        "missing_required_parameter",
    ),
    (
        "/responses",
        {
            "text": {
                "format": {"type": "json_schema", "name": "a", "strict": True, "schema": {"type": "object"}}
            }
        },
        "text.format",
        "invalid_json_schema",
    ),
    ("/completions", {"prompt": MISSING}, "prompt", "missing_required_parameter"),
    ("/completions", {"prompt": 5}, "prompt", "invalid_type"),
    ("/completions", {"prompt": "x " * 9000}, "prompt", "context_length_exceeded"),
    ("/completions", {"logit_bias": 5}, "logit_bias", "invalid_type"),
    ("/completions", {"presence_penalty": "x"}, "presence_penalty", "invalid_type"),
    ("/completions", {"n": 2}, "n", "invalid_value"),
    ("/completions", {"stream": True}, "stream", "invalid_value"),
    ("/completions", {"echo": True}, "echo", "unsupported_parameter"),
    ("/embeddings", {"input": MISSING}, "input", "missing_required_parameter"),
    ("/embeddings", {"input": []}, "input", "invalid_value"),
    ("/embeddings", {"input": ""}, "input", "invalid_value"),
    ("/embeddings", {"input": ["a", ""]}, "input", "invalid_value"),
    ("/embeddings", {"input": ["a", 5]}, "input[1]", "invalid_type"),
    ("/embeddings", {"input": {}}, "input", "invalid_type"),
    ("/embeddings", {"input": [[1, "a"]]}, "input[0][1]", "invalid_type"),
    ("/embeddings", {"input": [10**6]}, "input", "invalid_value"),
    ("/embeddings", {"input": [-1]}, "input", "invalid_value"),
    ("/embeddings", {"input": ["a"] * 2049}, "input", "array_above_max_length"),
    ("/embeddings", {"input": "x " * 600}, "input", "context_length_exceeded"),
    ("/embeddings", {"input": "x " * 5000}, "input", "context_length_exceeded"),
    ("/embeddings", {"dimensions": 5}, "dimensions", "invalid_value"),
    ("/embeddings", {"encoding_format": "hex"}, "encoding_format", "invalid_value"),
]


@pytest.mark.parametrize(("route", "change", "param", "code"), BAD)
def test_a_bad_body_is_refused_by_name(http, route, change, param, code):
    body = {key: value for key, value in (ROUTES[route] | change).items() if value is not MISSING}
    error = refused(http.post(route, json=body))
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("route", ["/chat/completions", "/responses"])
def test_a_bad_body_is_refused_before_a_stream_begins(http, route):
    name = "messages" if route == "/chat/completions" else "input"
    body = ROUTES[route] | {"stream": True, name: [{"role": "user", "content": "x " * 9000}]}
    assert refused(http.post(route, json=body))["code"] == "context_length_exceeded"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nothing",
        b'{"model": NaN}',
        b'{"model": 1e999}',
        b"\xff\xfe\x00",
        b'{"\\ud800": 1}',
        b'{"user": "\\udfff"}',
        b"[" * 100_000,
        b'{"user": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda raw: raw[:20].decode(errors="replace"),
)
def test_what_is_no_json_is_refused(http, route, raw):
    body = json.dumps(ROUTES[route]).encode()[:-1] + b", " + raw[1:] if raw[:2] in (b'{"',) else raw
    assert refused(http.post(route, content=body))["code"] == "invalid_json"


@pytest.mark.parametrize("raw", [b"[]", b'"text"', b"null", b"5"])
def test_a_body_that_is_no_object_is_refused(http, raw):
    assert "object" in refused(http.post("/chat/completions", content=raw))["message"]


def test_a_huge_body_is_refused(http):
    refused(http.post("/chat/completions", content=b"x" * (33 << 20)), 413)


def test_a_large_body_is_read_to_its_end(http):
    body = ROUTES["/chat/completions"] | {"user": "x" * (8 << 20)}
    assert http.post("/chat/completions", json=body).status_code == 200


def test_null_bytes_are_text(http):
    messages = [{"role": "user", "content": "a\0b"}]
    assert (
        http.post("/chat/completions", json=ROUTES["/chat/completions"] | {"messages": messages}).status_code
        == 200
    )


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_model_is_not_found(http, route):
    error = refused(http.post(route, json=ROUTES[route] | {"model": "gpt-9"}), 404)
    assert error["code"] == "model_not_found"
    assert CHAT_MODEL in error["message"]


@pytest.mark.parametrize(
    ("full", "status", "code"), [(True, 507, "insufficient_storage"), (False, 500, None)]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_store_that_fails_where_a_model_is_looked_up_is_answered_as_that(
    own_app, monkeypatch, streamed, full, status, code
):
    def fail(*_):
        raise StoreError("no space", full)

    monkeypatch.setattr(own_app.state.held.store, "model", fail)

    async def ask() -> httpx.Response:
        inside = httpx.ASGITransport(own_app)
        async with httpx.AsyncClient(transport=inside, base_url="http://endpoint/v1") as http:
            body = {"model": "ft:mine", "messages": HI, "stream": streamed}
            headers = {"authorization": "Bearer a-token"}
            return await http.post("/chat/completions", json=body, headers=headers)

    reply = asyncio.run(ask())
    error = {"message": "no space", "type": "server_error", "param": None, "code": code}
    assert (reply.status_code, reply.json()["error"]) == (status, error)


def test_an_unknown_route_and_a_wrong_method_are_refused(http):
    assert refused(http.get("/nothing"), 404)["code"] == "unknown_url"
    assert refused(http.get("/chat/completions"), 405)["code"] == "method_not_supported"
    assert refused(http.get("/models/gpt-9"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer ü"]
)
def test_a_wrong_token_is_refused(http, client, given):
    headers = {} if given is None else {"authorization": given.format(client.api_key).encode()}
    with httpx.Client(base_url=http.base_url, trust_env=False) as stranger:
        assert refused(stranger.get("/models", headers=headers), 401)["code"] == "invalid_api_key"


def engines(endpoint: process.Endpoint | None = None) -> list[str]:
    """The addresses of llama.cpp's servers in the endpoint's process; in the shared one's if None."""
    endpoint = endpoint or process.running()
    listening = psutil.Process(endpoint.pid).net_connections()
    ports = {found.laddr.port for found in listening if found.status == psutil.CONN_LISTEN}
    return [f"http://127.0.0.1:{port}" for port in ports if f":{port}/" not in endpoint.base_url]


def test_the_engines_ask_for_the_token_too(client):
    assert engines()
    for address in engines():
        assert httpx.get(f"{address}/slots").status_code == 401
        body = {"messages": HI, "max_tokens": 1}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 401


def busy(endpoint: process.Endpoint | None = None) -> int:
    """How many requests llama.cpp works on."""
    endpoint = endpoint or process.running()
    headers = {"authorization": f"Bearer {endpoint.token}"}
    slots = [
        slot
        for address in engines(endpoint)
        for slot in httpx.get(f"{address}/slots", headers=headers, timeout=60).json()
    ]
    return sum(slot["is_processing"] for slot in slots)


def comes_true(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


LONG = {"model": CHAT_MODEL, "messages": HI, "max_tokens": 4000, "logit_bias": {"2": -100}}


def test_a_client_that_leaves_a_stream_frees_its_slot(client):
    streams = [client.chat.completions.create(**LONG, stream=True) for _ in range(2)]
    for stream in streams:
        next(stream)
    assert busy() == 2
    for stream in streams:
        stream.close()
    assert comes_true(lambda: busy() == 0)
    assert chat(client, max_tokens=1).choices


def leaves(client, streamed: bool) -> None:
    """Ask for two long answers, and be gone before the first."""
    with pytest.raises(openai.APITimeoutError):
        if streamed:
            list(client.with_options(timeout=0.02).chat.completions.create(**LONG, n=2, stream=True))
        else:
            client.with_options(timeout=0.5).chat.completions.create(**LONG, n=2)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_before_its_answer_frees_its_slot(client, streamed):
    """Also while llama.cpp answers others all the time, as it does here to `busy`."""
    assert chat(client, max_tokens=1).choices
    leaves(client, streamed)
    assert comes_true(lambda: busy() == 0, seconds=20)
    assert chat(client, max_tokens=1).choices


SLOW_START = """
import sys, time
from companion.local import gateway

load = gateway.load
gateway.load = lambda *given, **named: time.sleep(4) or load(*given, **named)
gateway.serve(token="a-token", shared=False)
"""


def test_a_client_that_leaves_while_the_engine_starts_frees_its_slot():
    with subprocess.Popen([sys.executable, "-c", SLOW_START], stdout=subprocess.PIPE, text=True) as gateway:
        try:
            address = gateway.stdout.readline().strip().partition("=")[2]
            own = process.Endpoint(address, "a-token", gateway.pid)
            client = openai.OpenAI(base_url=address, api_key=own.token, max_retries=0)
            for streamed in (True, False):
                leaves(client, streamed)
            assert not engines(own)
            assert comes_true(lambda: engines(own))
            assert chat(client, max_tokens=1).choices
            assert comes_true(lambda: busy(own) == 0, seconds=20)
        finally:
            gateway.terminate()


def test_sixty_four_requests_at_once_are_all_answered(client):
    def one(number):
        if number % 4 == 3:
            return len(embed(client, f"text {number}").data[0].embedding)
        return (
            chat(client, [{"role": "user", "content": f"Say {number}."}], max_tokens=3)
            .choices[0]
            .message.content
        )

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(one, range(64)))


@pytest.mark.slow
def test_four_long_requests_side_by_side_are_all_answered(client):
    def one(number):
        long = f"{number} " + "word " * 1500
        return chat(client, [{"role": "user", "content": long}], max_tokens=2).usage.prompt_tokens

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(one, range(4))) > 1500


def test_an_answer_does_not_depend_on_what_else_is_computed(client):
    def one(number):
        messages = [{"role": "user", "content": f"Tell me about tent number {number}."}]
        return chat(client, messages, temperature=0, max_tokens=24).choices[0].message.content

    alone = [one(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, range(6))) == alone


def test_long_use_does_not_make_the_endpoint_grow(client):
    """This one has answered whatever the tests before asked; a new one is measured in test_process.py."""
    chat(client, max_tokens=1)
    embed(client, ["a tent"] * 32)
    endpoint = psutil.Process(process.running().pid)
    deadline = time.monotonic() + 3 * gateway.REST  # memory is given back between requests
    while endpoint.memory_info().rss > 750e6 and time.monotonic() < deadline:
        time.sleep(1)
    assert endpoint.memory_info().rss < 750e6


ATOMS = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**25,
    -0.5,
    1e308,
    "",
    "a",
    "\0",
    "ü🙂",
    [],
    {},
    [[]],
    [None],
    {"": {}},
    {"type": "function"},
    {"type": "json_schema"},
    ["a", 1],
]


def mutated(value, luck: random.Random):
    """The value with one thing in it changed, dropped or doubled."""
    if isinstance(value, dict) and value and luck.random() < 0.8:
        key = luck.choice(sorted(value))
        if luck.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutated(value[key], luck)}
    if isinstance(value, list) and value and luck.random() < 0.8:
        at = luck.randrange(len(value))
        return value[:at] + [mutated(value[at], luck)] * luck.choice([0, 1, 1, 1, 2]) + value[at + 1 :]
    return luck.choice(ATOMS)


FULL = {
    "/chat/completions": ROUTES["/chat/completions"]
    | {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["."],
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1},
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "stream": False,
        "tools": [LOOK_UP, WEATHER],
        "tool_choice": "auto",
        "metadata": {"a": "b"},
    },
    "/responses": ROUTES["/responses"]
    | {
        "input": [
            {"role": "user", "content": "hi"},
            {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        ],
        "instructions": "Be brief.",
        "temperature": 0.5,
        "store": False,
        "stream": False,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_schema", "name": "t", "schema": SCHEMA, "strict": True}},
    },
    "/completions": ROUTES["/completions"]
    | {"logprobs": 2, "stop": ["."], "logit_bias": {"5": 1}, "seed": 1, "echo": False},
    "/embeddings": ROUTES["/embeddings"]
    | {"input": ["a", "b"], "encoding_format": "float", "dimensions": 384},
}


@pytest.mark.slow
@pytest.mark.parametrize("route", FULL)
def test_no_mutated_body_is_an_error_of_the_endpoint(http, route):
    luck = random.Random(route)
    limits = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
    seen = set()
    for _ in range(100):
        body = FULL[route]
        for _ in range(luck.choice([1, 1, 2, 3])):
            body = mutated(body, luck)
        if isinstance(body, dict) and route != "/embeddings":
            body |= {name: 2 for name in limits & FULL[route].keys()}
        reply = http.post(route, json=body) if body is not MISSING else None
        seen.add(reply.status_code)
        assert reply.status_code == 200 or 400 <= reply.status_code < 500, (body, reply.text)
        if reply.status_code != 200:
            refused(reply, reply.status_code)
    assert seen >= {200, 400}
