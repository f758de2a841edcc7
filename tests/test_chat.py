import contextlib
import json
import subprocess
import sys
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from scripted import MODEL, Broken, Client, count

from companion.chat import Chat, Usage


def chat_with(*script, system=None, finish_reason="stop", **arguments):
    return Chat(system, model=MODEL, client=Client(*script, finish_reason=finish_reason), **arguments)


def look_up_order(order_id: str, detail: Annotated[int, Field(ge=0, description="how much")] = 1) -> dict:
    """Look up an order by its number."""
    if order_id == "0":
        raise KeyError("no such order")
    return {"order_id": order_id, "state": "packed", "detail": detail}


def roles(messages):
    return [message["role"] for message in messages]


# What it remembers


def test_sends_the_system_message_and_everything_said_so_far():
    chat = chat_with("Hello Ann", "Ann", system="Be brief.")
    chat.ask("I am Ann")
    assert chat.ask("Who am I?").text == "Ann"
    assert chat.client.requests[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I am Ann"},
        {"role": "assistant", "content": "Hello Ann"},
        {"role": "user", "content": "Who am I?"},
    ]
    assert chat.messages[-1] == {"role": "assistant", "content": "Ann"}


def test_a_stream_yields_the_reply_in_pieces_and_remembers_it_whole():
    chat = chat_with("To be or not to be")
    pieces = list(chat.stream("Go on"))
    assert len(pieces) > 1
    assert "".join(pieces) == "To be or not to be" == chat.messages[-1]["content"]
    assert chat.client.streams[0].closed


def test_an_abandoned_stream_leaves_no_trace_and_is_closed():
    chat = chat_with("one two three", "four")
    stream = chat.stream("Count")
    assert next(stream) == "one"
    stream.close()
    assert chat.messages == []
    assert chat.client.streams[0].closed
    chat.ask("Go on")
    assert roles(chat.client.requests[1]["messages"]) == ["user"]


@pytest.mark.parametrize("way", ["ask", "stream"])
def test_a_request_that_fails_leaves_the_history_as_it_was(way):
    chat = chat_with("Hello", openai.OpenAIError("down"), "Back")
    chat.ask("Hi")
    before = list(chat.messages)
    with pytest.raises(openai.OpenAIError, match="down"):
        list(getattr(chat, way)("Are you there?"))
    assert chat.messages == before
    assert chat.ask("And now?").text == "Back"


def test_a_stream_that_ends_in_the_middle_raises_and_leaves_the_history_as_it_was():
    chat = chat_with(Broken("half a"))
    with pytest.raises(RuntimeError, match="before the reply was complete"):
        list(chat.stream("Hi"))
    assert chat.messages == []


def test_clear_keeps_only_what_the_system_said():
    chat = chat_with("Hello", system="Be brief.")
    chat.ask("Hi")
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.usage.requests == 1


def test_options_of_a_turn_go_over_those_of_the_chat_and_last_one_turn():
    chat = chat_with("a", "b", temperature=0, max_tokens=9)
    chat.ask("Hi", temperature=1, model="another")
    chat.ask("Hi")
    first, second = chat.client.requests
    assert (first["temperature"], first["max_tokens"], first["model"]) == (1, 9, "another")
    assert (second["temperature"], second["max_tokens"], second["model"]) == (0, 9, MODEL)
    assert "tools" not in first


# What it costs


def test_usage_adds_up_over_asked_streamed_and_failed_turns():
    chat = chat_with("one two", "three", [("look_up_order", "{}")], tools=[look_up_order], max_steps=1)
    asked = chat.ask("Hi").usage
    list(chat.stream("Go on"))
    with pytest.raises(RuntimeError):
        chat.ask("Look")
    sent = [count(request) for request in chat.client.requests]
    assert asked == Usage(prompt=sent[0], completion=2, requests=1)
    assert chat.usage == Usage(prompt=sum(sent), completion=2 + 1 + 1, requests=3)


def test_cost_is_usage_at_the_prices_of_a_million_tokens():
    chat = chat_with("one two", prices=(1_000_000, 3_000_000))
    assert chat.cost == 0
    usage = chat.ask("Hi").usage
    assert chat.cost == pytest.approx(usage.prompt + 3 * usage.completion)
    assert chat_with().cost is None


# Tools


def test_a_function_is_described_by_its_signature_and_docstring():
    chat = chat_with("ok", tools=[look_up_order])
    chat.ask("Hi")
    assert chat.client.requests[0]["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "look_up_order",
                "description": "Look up an order by its number.",
                "parameters": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "order_id": {"type": "string"},
                        "detail": {"type": "integer", "default": 1, "minimum": 0, "description": "how much"},
                    },
                    "required": ["order_id"],
                },
            },
        }
    ]


@pytest.mark.parametrize("way", ["ask", "stream"])
def test_tools_that_the_model_asks_for_are_run_and_answered_in_order(way):
    calls = [("look_up_order", '{"order_id": "7"}'), ("look_up_order", '{"order_id": "8", "detail": 2}')]
    chat = chat_with(calls, "Both are packed.", tools=[look_up_order])
    reply = "".join(
        getattr(chat, way)("Where are 7 and 8?").text if way == "ask" else chat.stream("Where are 7 and 8?")
    )
    assert reply == "Both are packed."
    assert roles(chat.messages) == ["user", "assistant", "tool", "tool", "assistant"]
    asked = chat.messages[1]["tool_calls"]
    assert [(call["id"], call["type"]) for call in asked] == [("call_0", "function"), ("call_1", "function")]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in asked] == calls
    results = chat.messages[2:4]
    assert [message["tool_call_id"] for message in results] == ["call_0", "call_1"]
    assert [json.loads(message["content"])["order_id"] for message in results] == ["7", "8"]
    assert chat.client.requests[1]["messages"] == chat.messages[:4]


def test_a_reply_tells_what_was_called_and_what_the_whole_turn_took():
    chat = chat_with([("look_up_order", '{"order_id": "7"}')], "Packed.", tools=[look_up_order])
    reply = chat.ask("Where is 7?")
    (call,) = reply.tool_calls
    assert (call.name, call.arguments) == ("look_up_order", '{"order_id": "7"}')
    assert json.loads(call.result) == {"order_id": "7", "state": "packed", "detail": 1}
    assert reply.usage == chat.usage
    assert reply.usage.requests == 2


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("look_up_order", '{"order_id": "0"}', "KeyError: 'no such order'"),
        ("look_up_order", "{}", "order_id: Missing required argument"),
        (
            "look_up_order",
            '{"order_id": "7", "detail": -1}',
            "detail: Input should be greater than or equal to 0",
        ),
        ("look_up_order", '{"order_id": "7", "colour": "red"}', "colour: Unexpected keyword argument"),
        ("look_up_order", '{"order_id": ', "Invalid JSON"),
        ("refund", "{}", "there is no tool 'refund', only look_up_order, cancel"),
        ("cancel", '{"order_id": "7"', "JSONDecodeError"),
        ("cancel", '{"number": "7"}', "unexpected keyword argument 'number'"),
    ],
)
def test_what_goes_wrong_with_a_call_is_told_to_the_model_which_goes_on(name, arguments, told):
    cancel = {"type": "function", "function": {"name": "cancel", "parameters": {"type": "object"}}}
    tools = [look_up_order, (cancel, lambda order_id: "done")]
    chat = chat_with([(name, arguments)], "I am sorry.", tools=tools)
    assert chat.ask("Do it").text == "I am sorry."
    assert chat.messages[2]["content"].startswith("Error: ")
    assert told in chat.messages[2]["content"]


def test_a_schema_and_function_pair_is_sent_as_given_and_called_by_name():
    class Cancel(BaseModel):
        """Cancel an order."""

        order_id: str
        reason: Literal["late", "other"]

    schema = openai.pydantic_function_tool(Cancel)
    seen = []
    chat = chat_with(
        [("Cancel", '{"order_id": "7", "reason": "late"}')],
        "Done.",
        tools=[(schema, lambda order_id, reason: seen.append((order_id, reason)) or "cancelled")],
    )
    chat.ask("Cancel 7")
    assert chat.client.requests[0]["tools"] == [schema]
    assert seen == [("7", "late")]
    assert chat.messages[2]["content"] == "cancelled"


def test_a_tool_without_arguments_takes_an_empty_string_for_them():
    def opening_hours():
        return "9 to 5"

    chat = chat_with([("opening_hours", "")], "From nine.", tools=[opening_hours])
    chat.ask("When?")
    assert chat.messages[2]["content"] == "9 to 5"


def test_too_many_steps_raise_and_leave_the_history_as_it_was():
    chat = chat_with(*[[("look_up_order", '{"order_id": "7"}')]] * 3, tools=[look_up_order], max_steps=2)
    with pytest.raises(RuntimeError, match=r"after 2 requests, last for 'look_up_order'.*max_steps"):
        chat.ask("Where?")
    assert chat.messages == []
    assert len(chat.client.requests) == 2


def test_a_forced_call_is_forced_once_and_a_forbidden_one_stays_forbidden():
    call = [("look_up_order", '{"order_id": "7"}')]
    chat = chat_with(call, "Packed.", call, "Packed.", tools=[look_up_order])
    chat.ask("Where?", tool_choice={"type": "function", "function": {"name": "look_up_order"}})
    chat.ask("Where?", tool_choice="none")
    assert [request["tool_choice"] for request in chat.client.requests][1:] == ["auto", "none", "none"]


# Its token budget


def long_conversation(**arguments):
    """Ten turns, each with a tool call, of 100 words or so."""
    words = "there are several words in this part of the turn " * 3
    script = []
    for _ in range(10):
        script += [[("look_up_order", '{"order_id": "7"}')], words]
    chat = chat_with(*script, system="Be brief.", tools=[look_up_order], **arguments)
    for i in range(10):
        chat.ask(f"turn {i}: {words}")
    return chat


def test_prompts_stay_within_the_budget():
    free, bound = long_conversation(), long_conversation(max_context_tokens=300)
    assert max(count(request) for request in free.client.requests) > 600
    sizes = [count(request) for request in bound.client.requests]
    assert max(sizes) <= 300
    assert sizes[-1] > 200, "no more is left out than is needed"


def test_whole_turns_are_left_out_oldest_first_and_the_system_message_stays():
    chat = long_conversation(max_context_tokens=300)
    for request in chat.client.requests:
        system, *kept = request["messages"]
        assert system == chat.messages[0]
        start = chat.messages.index(kept[0])
        assert kept[0]["role"] == "user"
        assert kept == chat.messages[start : start + len(kept)]
    assert start > 1, "something was left out"


def test_no_tool_result_is_parted_from_its_call():
    for request in long_conversation(max_context_tokens=300).client.requests:
        asked = set()
        for message in request["messages"]:
            asked |= {call["id"] for call in message.get("tool_calls", [])}
            assert message.get("tool_call_id") in asked | {None}


def test_history_keeps_what_the_model_no_longer_sees_and_context_tells_what_it_saw():
    chat = long_conversation(max_context_tokens=300)
    assert len(chat.messages) == 1 + 10 * 4
    assert chat.context == chat.client.requests[-1]["messages"]
    assert len(chat.context) < len(chat.messages) / 2


def test_a_turn_longer_than_the_budget_is_sent_alone_with_the_system_message():
    chat = chat_with("Hi", "Long indeed", system="Be brief.", max_context_tokens=20)
    chat.ask("Hello")
    chat.ask("word " * 100)
    assert roles(chat.client.requests[1]["messages"]) == ["system", "user"]


# With a real model


def test_a_real_model_is_asked_and_streamed_and_its_tokens_counted(client):
    chat = Chat("Be brief.", client=client, temperature=0, max_tokens=8)
    reply = chat.ask("What is a tent?")
    assert reply.text and reply.text == chat.messages[-1]["content"]
    assert 1 <= reply.usage.completion <= 8 < reply.usage.prompt
    assert "".join(chat.stream("And a boot?")) == chat.messages[-1]["content"]
    assert chat.usage.requests == 2
    assert chat.usage.prompt > 2 * reply.usage.prompt
    assert reply.usage.completion < chat.usage.completion <= reply.usage.completion + 8


def test_prompts_stay_within_the_budget_as_a_real_model_counts_them(client):
    chat = Chat("Be brief.", client=client, max_context_tokens=100, temperature=0, max_tokens=4)
    said = [
        "Tell me about tents for a rainy week.",
        "49.90 or 129.95 EUR?",
        "{'order': 77, 'items': ['A1']}",
        "ok",
    ]
    prompts = [chat.ask(text).usage.prompt for text in [*said, *said[:2]]]
    assert 70 < max(prompts) <= 100
    assert roles(chat.context)[:2] == ["system", "user"]
    assert len(chat.context) < len(chat.messages) - 2


def test_a_real_model_calls_a_tool_and_is_told_the_result(client):
    asked = []

    def look_up_order(order_id: str) -> str:
        """Look up an order by its number."""
        asked.append(order_id)
        return "packed"

    chat = Chat(client=client, tools=[look_up_order], max_steps=2, temperature=0, max_tokens=60)
    # A small model may go on calling instead of answering; that the endpoint took the result is what counts.
    with contextlib.suppress(RuntimeError):
        chat.ask("Where is order 1234?", tool_choice="required")
    assert isinstance(asked[0], str)
    assert chat.usage.requests == 2
    assert roles(chat.context) == ["user", "assistant", "tool"]


# What it refuses


@pytest.mark.parametrize("text", ["", "  \n", None, 7, ["Hi"]])
def test_only_text_can_be_said(text):
    chat = chat_with("Hello")
    for say in (chat.ask, chat.stream):
        with pytest.raises(ValueError, match="must be a string with something in it"):
            say(text)
    assert chat.client.requests == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"system": ""}, "system must be a string"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_context_tokens": 0}, "max_context_tokens must be at least 1"),
        ({"tools": ["look_up_order"]}, "not 'look_up_order'"),
        ({"tools": [(look_up_order, {})]}, "a tool of two parts"),
        ({"tools": [look_up_order, look_up_order]}, "two tools are named 'look_up_order'"),
        ({"tools": [lambda a, /: a]}, "by position only"),
        ({"n": 2}, "Chat sets n itself"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice names 'x'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments, told):
    with pytest.raises(ValueError, match=told):
        chat_with(**arguments)


@pytest.mark.parametrize("way", ["ask", "stream"])
def test_options_that_it_sets_itself_are_refused_in_a_turn(way):
    with pytest.raises(ValueError, match="Chat sets messages, stream itself"):
        getattr(chat_with(), way)("Hi", messages=[], stream=True)


# How it looks


def test_markup_in_a_conversation_is_shown_and_not_run():
    chat = chat_with([("look_up_order", "<b>{}</b>")], "<script>1</script>", tools=[look_up_order])
    reply = chat.ask('<img src="x">')
    for shown in (chat._repr_html_(), reply._repr_html_()):
        assert "<script>" not in shown and "<b>" not in shown and "<img" not in shown
    assert "&lt;script&gt;1&lt;/script&gt;" in reply._repr_html_()
    assert "&lt;img src=&quot;x&quot;&gt;" in chat._repr_html_()


def test_every_message_is_shown_with_its_role_in_words():
    chat = chat_with(
        [("look_up_order", '{"order_id": "7"}')], "Packed.", system="Be brief.", tools=[look_up_order]
    )
    chat.ask("Where is 7?")
    for role in ("system", "user", "assistant", "tool"):
        assert f"<strong>{role}</strong>" in chat._repr_html_()
    assert repr(chat).splitlines()[1:4] == [
        "system: Be brief.",
        "user: Where is 7?",
        'assistant: calls look_up_order({"order_id": "7"})',
    ]


def test_a_reply_that_was_cut_off_says_so():
    assert "cut off" in chat_with("To be or", finish_reason="length").ask("Go on")._repr_html_()
    assert "cut off" not in chat_with("To be or").ask("Go on")._repr_html_()


def test_a_reply_prints_as_its_text():
    assert str(chat_with("Hello").ask("Hi")) == "Hello"


def test_importing_it_loads_nothing_heavy():
    heavy = "openai", "pydantic", "numpy", "pandas", "sklearn", "ipywidgets", "IPython"
    code = f"import sys, companion.chat, companion.retrieval; print(*set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
