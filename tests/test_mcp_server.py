"""The MCP server: the same tools and rules as the desk's, to a client that starts it as a process."""

import asyncio
import sys

import pytest

from companion.shop import database
from companion.shop.mcp_server import READ_ONLY, make
from companion.shop.systems import schemas

mcp = pytest.importorskip("mcp")


def talk(server, conversation):
    """Run `conversation`, a coroutine function of a connected client."""

    async def run():
        async with mcp.Client(server) as client:
            return await conversation(client)

    return asyncio.run(run())


async def cancel(client, order_id="FW-10759", postcode="IV2 3DQ"):
    """Every step of a cancellation, as (status, is it an error)."""
    found = await client.call_tool("find_orders", {"order_id": order_id, "postcode": postcode})
    proposed = await client.call_tool("cancel_order", {"order_id": order_id})
    token = proposed.structured_content.get("token", "none")
    done = await client.call_tool("confirm", {"token": token})
    return [(answer.structured_content["status"], answer.is_error) for answer in (found, proposed, done)]


@pytest.mark.parametrize("may_confirm", [False, True])
def test_the_desk_s_tools_are_listed_with_their_schemas_and_confirm_only_where_asked_for(may_confirm):
    async def tools(client):
        return (await client.list_tools()).tools

    listed = {tool.name: tool for tool in talk(make(database(), may_confirm), tools)}
    wanted = {schema["function"]["name"]: schema["function"] for schema in schemas()}
    assert list(listed) == [name for name in wanted if may_confirm or name != "confirm"]
    for name, tool in listed.items():
        assert tool.input_schema == wanted[name]["parameters"]
        assert tool.description == wanted[name]["description"]
        assert tool.annotations.read_only_hint == (name in READ_ONLY)


@pytest.mark.parametrize(
    ("options", "last"), [([], ("invalid", True)), (["--confirm"], ("done", False))], ids=["agent", "button"]
)
def test_a_process_of_its_own_serves_a_case_and_confirms_only_where_started_for_it(options, last):
    arguments = ["-m", "companion.shop.mcp_server", *options]
    server = mcp.StdioServerParameters(command=sys.executable, args=arguments)
    assert talk(server, cancel) == [("ok", False), ("proposed", False), last]


def test_an_agent_cannot_confirm_what_it_proposed():
    connection = database()
    assert [status for status, _ in talk(make(connection), cancel)] == ["ok", "proposed", "invalid"]
    row = connection.execute("SELECT status FROM orders WHERE order_id = 'FW-10759'").fetchone()
    assert row["status"] == "processing"


def test_a_client_changes_nothing_without_knowing_who_it_speaks_for():
    connection = database()

    async def conversation(client):
        return await cancel(client, postcode="ZZ9 9ZZ")

    server = make(connection, may_confirm=True)
    assert [status for status, _ in talk(server, conversation)] == ["refused"] * 3
    row = connection.execute("SELECT status FROM orders WHERE order_id = 'FW-10759'").fetchone()
    assert row["status"] == "processing"


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [("order_status", {"order": "FW-10759"}, "order_id"), ("delete_everything", {}, "delete_everything")],
)
def test_a_call_that_cannot_be_read_is_an_error_that_names_the_value(name, arguments, named):
    async def conversation(client):
        return await client.call_tool(name, arguments)

    answer = talk(make(database()), conversation)
    assert answer.is_error
    assert named in answer.structured_content["reason"]


def test_two_clients_have_cases_of_their_own():
    connection = database()

    async def identify(client):
        return await cancel(client)

    async def order(client):
        return (await client.call_tool("order_status", {"order_id": "FW-10759"})).structured_content["status"]

    talk(make(connection), identify)
    assert talk(make(connection), order) == "refused"
