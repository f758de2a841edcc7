"""Fernway's order systems as an MCP server: `python -m companion.shop.mcp_server` serves them over stdio.

Any program that speaks the Model Context Protocol can start it, list its tools and call them. One process is
one case at the support desk, on a database of its own that ends with it. The tools and their rules are those
of `companion.shop.systems`; this module only translates. It needs the package `mcp` (the extra "book").

It offers no `confirm`: an agent proposes, and a person's yes comes from outside it. A program with a button
for that yes starts `python -m companion.shop.mcp_server --confirm`, and keeps the tool from its model.

What it does not do: authenticate the program that started it, which could run any other program as well; or
ask a person. A client that shows the tools to a model should ask its user before it calls a tool that is not
marked read-only.

https://modelcontextprotocol.io/specification/2026-07-28
"""

import argparse
import json
import sqlite3
from typing import TYPE_CHECKING

from companion.shop import database
from companion.shop.systems import Desk, schemas

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server

READ_ONLY = ("find_orders", "order_status")  # they change nothing but the audit trail


def make(connection: sqlite3.Connection, may_confirm: bool = False) -> "Server":
    """An MCP server for one new case on the shop's database.

    connection: from `shop.database()`, used by the thread that runs the server only.
    may_confirm: whether `confirm` is offered, to a client that asks a person before it calls it.
    """
    from mcp import types
    from mcp.server.lowlevel import Server

    desk = Desk(connection)
    offered = {schema["function"]["name"]: schema["function"] for schema in schemas()}
    if not may_confirm:
        del offered["confirm"]

    async def list_tools(context, parameters) -> types.ListToolsResult:
        tools = []
        for tool in offered.values():
            notes = types.ToolAnnotations(
                read_only_hint=tool["name"] in READ_ONLY, destructive_hint=tool["name"] == "confirm"
            )
            tools.append(
                types.Tool(
                    name=tool["name"],
                    description=tool["description"],
                    input_schema=tool["parameters"],
                    annotations=notes,
                )
            )
        return types.ListToolsResult(tools=tools)

    async def call_tool(context, parameters) -> types.CallToolResult:
        if parameters.name in offered:
            answer = desk.call(parameters.name, parameters.arguments or {})
        else:
            answer = {"status": "invalid", "reason": f"this server offers no tool {parameters.name!r}"}
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=json.dumps(answer))],
            structured_content=answer,
            is_error=answer["status"] == "invalid",
        )

    return Server("fernway", on_list_tools=list_tools, on_call_tool=call_tool)


def main() -> None:
    """Serve one case over standard input and output, until the client leaves."""
    import asyncio

    from mcp.server.stdio import stdio_server

    parser = argparse.ArgumentParser(prog="python -m companion.shop.mcp_server")
    parser.add_argument("--confirm", action="store_true", help="offer confirm, to a client that asks")
    options = parser.parse_args()

    async def serve() -> None:
        server = make(database(), options.confirm)
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    asyncio.run(serve())


if __name__ == "__main__":
    main()
