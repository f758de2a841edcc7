"""How tools, calls and results are written as text, and read back."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from llguidance import LLMatcher

from companion.local import completions, toolcalls, wire
from companion.local.wire import ApiError, Message, NamedTool, Tool

ORDER = Tool.model_validate(
    {
        "type": "function",
        "function": {
            "name": "get_order",
            "description": "Look up an order.",
            "parameters": {
                "type": "object",
                "properties": {"order_id": {"type": "string"}},
                "required": ["order_id"],
            },
        },
    }
)
PING = Tool.model_validate({"type": "function", "function": {"name": "ping"}})
CALL = {"id": "call_1", "type": "function", "function": {"name": "ping", "arguments": "{}"}}
WRITTEN = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'


def named(name):
    return NamedTool.model_validate({"type": "function", "function": {"name": name}})


def messages(*records):
    return [Message.model_validate(record) for record in records]


def test_tools_are_described_after_the_callers_own_instructions():
    plain = toolcalls.plain_messages(
        messages({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}), [ORDER]
    )
    assert [message["role"] for message in plain] == ["system", "user"]
    assert plain[0]["content"].startswith("Be brief.")
    assert '"get_order"' in plain[0]["content"] and "order_id" in plain[0]["content"]


def test_a_call_and_its_result_stand_in_the_text_that_the_model_reads():
    plain = toolcalls.plain_messages(
        messages(
            {"role": "user", "content": "Are you there?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "pong"},
        ),
        [PING],
    )
    written = plain[-2]["content"]
    assert plain[-2]["role"] == "assistant" and toolcalls.read_call(written)["function"]["name"] == "ping"
    assert plain[-1] == {"role": "user", "content": "<tool_response>pong</tool_response>"}


def test_a_result_that_answers_no_call_is_refused():
    stray = messages({"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "x", "content": "?"})
    with pytest.raises(ApiError, match="'x'"):
        toolcalls.plain_messages(stray, [PING])


@pytest.mark.parametrize("choice", [None, "auto", "required", named("get_order")])
def test_every_choice_has_a_grammar_that_the_engine_can_use(choice):
    assert LLMatcher.validate_grammar(toolcalls.call_grammar([ORDER, PING], choice)) == ""


def test_a_named_function_leaves_out_the_others():
    grammar = toolcalls.call_grammar([ORDER, PING], named("ping"))
    assert "ping" in grammar and "get_order" not in grammar


def test_none_and_no_tools_leave_the_model_free():
    assert toolcalls.call_grammar([ORDER], "none") is None
    assert toolcalls.call_grammar([], "required") is None


def test_where_no_tool_may_be_called_what_looks_like_a_call_is_text():
    class Upstream:
        async def answer(self, engine, route, body):
            choice = {"message": {"content": WRITTEN}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}
            return {"choices": [choice], "usage": usage}

    hello = [{"role": "user", "content": "Hi"}]
    for choice, text in (("none", WRITTEN), ("auto", None)):
        request = wire.ChatRequest(model="m", messages=hello, tools=[PING], tool_choice=choice)
        with ThreadPoolExecutor(1) as thread:  # the tests of the pages leave a loop running in this one
            chat = completions.chat(Upstream(), None, request)
            answer = thread.submit(asyncio.run, chat).result()["choices"][0]
        assert answer["message"]["content"] == text
        assert (answer["finish_reason"] == "tool_calls") == (choice == "auto")


def test_a_name_that_is_no_tool_is_refused():
    with pytest.raises(ApiError, match="'refund'"):
        toolcalls.call_grammar([ORDER], named("refund"))


def test_a_string_argument_without_a_limit_gets_one_so_that_a_call_ends():
    assert f'"maxLength": {toolcalls.LONGEST}' in toolcalls.call_grammar([ORDER], "required")


def test_arguments_come_back_as_json():
    text = '<tool_call>{"name": "get_order", "arguments": {"order_id": "FW-10234"}}</tool_call>'
    call = toolcalls.read_call(text)
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert json.loads(call["function"]["arguments"]) == {"order_id": "FW-10234"}


@pytest.mark.parametrize(
    "text",
    [
        "It left on Tuesday.",
        '<tool_call>{"name": "ping"',
        '<tool_call>{"name": "ping", "arguments": ',
        "<tool_call>ping</tool_call>",
        "",
    ],
)
def test_words_and_half_calls_are_no_calls(text):
    assert toolcalls.read_call(text) is None
