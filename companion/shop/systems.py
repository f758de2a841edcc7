"""Fernway's order systems, as tools that keep the company's own rules whoever calls them.

    desk = Desk(shop.database())
    desk.find_orders(order_id="FW-10759", postcode="IV2 3DQ")     who is this? and what have they ordered?
    desk.cancel_order(order_id="FW-10759")                        {"status": "proposed", "token": "…", …}
    desk.confirm(token="…")                                       {"status": "done", …}
    desk.call("order_status", '{"order_id": "FW-10759"}')         the same, as a model asks for it
    schemas()                                                     what goes into the `tools=` of a request

Every tool answers with a plain dict whose `status` says what happened:

    "ok"        here is what you asked for
    "proposed"  nothing has changed yet: read `summary` out; `confirm` the `token` on the customer's yes
    "done"      the database has changed; a repeated `confirm` gives this same answer and changes nothing
    "refused"   not allowed: `policy` is the id of the article that says so, `reason` says why, to be read out
    "invalid"   only from `call`: the model's arguments cannot be read; `reason` names the value

What it holds on to: nobody's data are shown or touched before two facts that belong together have been named;
whatever changes an order or moves money takes two steps, and its rules are checked in both; nothing is paid
twice; a credit stays within 15.00 for a case and for an order; a refund above 150.00 waits for `sign`, which
is no tool; after an urgent hand-off nothing more is done in the case; every call is in the table `audit`.

What it cannot know: whether what a customer says is true, whether an item is unused, or whether the customer
has really agreed to what is confirmed. It knows of no model. Its tables lie beside those of
`shop.database()` and are made when the first `Desk` opens.
"""

import functools
import hashlib
import json
import re
import sqlite3
from datetime import date

from companion.json_schema import Draft202012Validator
from companion.shop import TODAY

CREDIT_LIMIT = 15.0  # pounds of goodwill that support may give alone, article "compensation"
REFUND_LIMIT = 150.0  # pounds above which a second person signs, article "compensation"
EU_RETURN = 6.95  # pounds, articles "returns" and "shipping-eu"
ATTEMPTS = 5  # wrong answers to "who are you?" in one case

# Article "escalation": sign -> (who takes over, within what time). Nothing else is done in such a case.
URGENT = {
    "danger": ("safety lead and team lead", "30 minutes"),
    "legal": ("team lead", "2 hours"),
    "press": ("managing director's office", "2 hours"),
    "vulnerable": ("team lead", "30 minutes"),
    "fraud": ("payments desk", "30 minutes"),
    "data_protection": ("privacy contact", "the same day"),
}
# The normal queue: article "compensation" for approvals; later than 2 working days is a mistake of ours.
QUEUE = {"approval": ("team lead", "tomorrow at 17:00"), "other": ("support", "2 working days")}
SIGNS = {**URGENT, **QUEUE}

# How postcodes look, by country, where they are not five digits.
POSTCODES = {
    "GB": r"[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}",
    "IE": r"[A-Z]\d[\dW] ?[A-Z\d]{4}",
    "SE": r"\d{3} ?\d{2}",
    "NL": r"\d{4}(?: ?[A-Z]{2})?",
    "PT": r"\d{4}(?:-\d{3})?",
    **dict.fromkeys(("AT", "BE", "DK", "SI"), r"\d{4}"),
}


def fits_country(postcode: str, country: str) -> bool:
    """Whether it looks like a postcode of the country, a two-letter code."""
    return bool(re.fullmatch(POSTCODES.get(country, r"\d{5}"), postcode.strip().upper()))


CREDIT_REASONS = ("our_mistake", "lost_parcel", "same_fault_twice")

_TABLES = """
CREATE TABLE IF NOT EXISTS cases (
    case_id INTEGER PRIMARY KEY,
    opened TEXT NOT NULL,
    customer_id TEXT REFERENCES customers);
CREATE TABLE IF NOT EXISTS proposals (
    token TEXT PRIMARY KEY,
    case_id INTEGER NOT NULL REFERENCES cases,
    tool TEXT NOT NULL,
    arguments TEXT NOT NULL CHECK (json_valid(arguments)),
    result TEXT CHECK (result IS NULL OR json_valid(result)));
CREATE TABLE IF NOT EXISTS addresses (
    order_id TEXT PRIMARY KEY REFERENCES orders,
    street TEXT NOT NULL,
    city TEXT NOT NULL,
    postcode TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS returns (
    order_id TEXT NOT NULL,
    sku TEXT NOT NULL,
    opened TEXT NOT NULL,
    cost REAL NOT NULL CHECK (cost >= 0),
    pays TEXT NOT NULL CHECK (pays IN ('refund', 'store credit')),
    PRIMARY KEY (order_id, sku),
    FOREIGN KEY (order_id, sku) REFERENCES order_items);
CREATE TABLE IF NOT EXISTS refunds (
    order_id TEXT PRIMARY KEY REFERENCES orders,
    amount REAL NOT NULL CHECK (amount > 0),
    reason TEXT NOT NULL CHECK (reason IN ('cancelled', 'lost')),
    opened TEXT NOT NULL,
    signed_by TEXT,
    state TEXT NOT NULL CHECK (state IN ('paid', 'waits for a signature')),
    CHECK (amount <= 150 OR state <> 'paid' OR signed_by IS NOT NULL));
CREATE TABLE IF NOT EXISTS resends (
    order_id TEXT PRIMARY KEY REFERENCES orders,
    opened TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS credits (
    order_id TEXT NOT NULL REFERENCES orders,
    reason TEXT NOT NULL CHECK (reason IN ('our_mistake', 'lost_parcel', 'same_fault_twice')),
    case_id INTEGER NOT NULL REFERENCES cases,
    amount REAL NOT NULL CHECK (amount > 0 AND amount <= 15),
    opened TEXT NOT NULL,
    PRIMARY KEY (order_id, reason));
CREATE TABLE IF NOT EXISTS escalations (
    case_id INTEGER NOT NULL REFERENCES cases,
    sign TEXT NOT NULL,
    goes_to TEXT NOT NULL,
    within TEXT NOT NULL,
    customer_id TEXT REFERENCES customers,
    summary TEXT NOT NULL CHECK (summary <> ''),
    facts TEXT NOT NULL CHECK (json_valid(facts)),
    opened TEXT NOT NULL,
    PRIMARY KEY (case_id, sign));
CREATE TABLE IF NOT EXISTS audit (
    n INTEGER PRIMARY KEY,
    case_id INTEGER NOT NULL REFERENCES cases,
    day TEXT NOT NULL,
    tool TEXT NOT NULL,
    arguments TEXT NOT NULL,
    status TEXT NOT NULL,
    result TEXT NOT NULL);
"""

# What `order_status` shows of an order, and of the tables that belong to it.
_SHOWN = ("order_id", "placed", "status", "shipping", "total", "payment")
_SHOWN += ("carrier", "tracking", "shipped", "delivered")
_PARTS = {
    "items": "sku, name, quantity, size, colour, unit_price",
    "returns": "sku, pays, cost",
    "refunds": "amount, reason, state",
    "credits": "amount, reason",
}

_TEXT = {"type": "string", "minLength": 1, "maxLength": 200}
_ORDER = {"type": "string", "description": "the order number, such as FW-10759", "maxLength": 20}
_SKU = {"type": "string", "description": "the item's number in that order, such as FW-401", "maxLength": 20}
_TOOLS: dict[str, dict] = {}


class _Refused(Exception):
    """A tool may not do this: the article's id, and the reason."""


def _tool(required, **properties):
    """Make a method of Desk a tool: its schema from the first line of its docstring and `properties`, its
    arguments checked, its refusals returned, its call and answer written to the audit trail, all in one
    transaction."""

    def decorate(method):
        name = method.__name__
        parameters = {
            "type": "object",
            "properties": properties,
            "required": required.split(),
            "additionalProperties": False,
        }
        description = " ".join(method.__doc__.split("\n\n")[0].split())
        _TOOLS[name] = {
            "type": "function",
            "function": {"name": name, "description": description, "parameters": parameters},
        }
        validator = Draft202012Validator(parameters)

        @functools.wraps(method)
        def run(self, /, **arguments):
            arguments = {key: value for key, value in arguments.items() if value is not None}
            for error in validator.iter_errors(arguments):
                where = "".join(f"{part}: " for part in error.path)
                raise ValueError(f"{name}: {where}{error.message}")
            for key, write in (("order_id", _order_number), ("sku", lambda text: text.strip().upper())):
                if key in arguments:
                    arguments[key] = write(arguments[key])
            with self._transaction():
                try:
                    result = method(self, **arguments)
                except _Refused as refusal:
                    policy, reason = refusal.args
                    result = {"status": "refused", "policy": policy, "reason": reason}
                asked, answered = json.dumps(arguments), json.dumps(result)
                day = self.today.isoformat()
                self._write("audit", None, self.case_id, day, name, asked, result["status"], answered)
            return result

        return run

    return decorate


def schemas(names=None):
    """The tools' schemas for the `tools=` of a chat request.

    names: which tools, in this order; None for all. A model that is to propose but never to decide gets them
        without "confirm".
    """
    unknown = [name for name in names or () if name not in _TOOLS]
    if unknown:
        raise ValueError(f"there is no tool {unknown[0]!r}: choose from {', '.join(_TOOLS)}")
    return [json.loads(json.dumps(_TOOLS[name])) for name in (_TOOLS if names is None else names)]


class Desk:
    """One case at Fernway's support desk: the tools, as methods that take keyword arguments only.

    connection: from `shop.database()`. Desks may share one; each is a case of its own, limits on orders and
        locks on accounts hold for all.
    today: the day it is, for deadlines.

    `case_id` is the case's number. Methods raise ValueError for arguments that their schema does not allow.
    """

    def __init__(self, connection: sqlite3.Connection, today: date = TODAY):
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "order_items" not in tables:
            raise ValueError("connection has no table order_items: open it with companion.shop.database()")
        self.connection, self.today = connection, today
        connection.executescript(_TABLES)
        with self._transaction():
            self.case_id = self._write("cases", None, today.isoformat(), None)

    def call(self, name: str, arguments: str | dict) -> dict:
        """Run the tool `name` as a model asked for it.

        arguments: a JSON object, as text or parsed.

        Returns the tool's answer; {"status": "invalid", "reason": …} where the name or the arguments cannot
        be used, so that the model, or the program around it, can ask again.
        """
        try:
            if name not in _TOOLS:
                raise ValueError(f"there is no tool {name!r}: choose from {', '.join(_TOOLS)}")
            arguments = json.loads(arguments) if isinstance(arguments, str | bytes) else arguments
            if not isinstance(arguments, dict):
                raise ValueError(f"{name}: arguments must be a JSON object, not {arguments!r}")
            return getattr(self, name)(**arguments)
        except (ValueError, RecursionError) as error:
            return {"status": "invalid", "reason": str(error)}

    # Reading

    @_tool(
        "",
        order_id=_ORDER,
        email={**_TEXT, "description": "the email address of the order"},
        postcode={**_TEXT, "description": "the postcode of the delivery address"},
    )
    def find_orders(self, order_id="", email="", postcode=""):
        """Check who the customer is and list their orders. Needs two of order number, email and postcode.

        The two must belong together. Which of them was wrong is not said, nor whether an order exists.
        """
        self._open()
        if sum(map(bool, (order_id, email.strip(), postcode.strip()))) < 2:
            raise _Refused(
                "privacy",
                "To be sure that it is you, I need two of these: order number, email address, postcode.",
            )
        failed = self._count(
            "audit",
            "case_id = ? AND tool = 'find_orders' AND status = 'refused' AND json_extract(result, '$.tried')",
            self.case_id,
        )
        if failed >= ATTEMPTS:
            raise _Refused("privacy", "That was tried too often. A person has to check who you are.")
        row = self._do(
            "SELECT customer_id FROM customers LEFT JOIN orders USING (customer_id)"
            " WHERE ? IN ('', order_id) AND ? IN ('', lower(email))"
            " AND ? IN ('', upper(replace(postcode, ' ', '')))",
            order_id,
            email.strip().lower(),
            postcode.replace(" ", "").upper(),
        ).fetchone()
        if row is None:
            reason = "These details do not belong together. Please check them."
            return {"status": "refused", "policy": "privacy", "reason": reason, "tried": True}
        if self.customer_id not in (None, row["customer_id"]):
            raise _Refused("privacy", "This case is about another customer. Please open a new one.")
        self._do("UPDATE cases SET customer_id = ? WHERE case_id = ?", row["customer_id"], self.case_id)
        self._open()
        orders = self._do(
            "SELECT order_id, placed, status, total FROM orders WHERE customer_id = ?"
            " ORDER BY placed DESC, order_id DESC",
            self.customer_id,
        )
        name = self._row("SELECT name FROM customers WHERE customer_id = ?", self.customer_id)["name"]
        return {"status": "ok", "customer": name, "orders": [dict(order) for order in orders]}

    @_tool("order_id", order_id=_ORDER)
    def order_status(self, order_id):
        """Look up one order: where it is, what it holds, and what has been returned, refunded or credited."""
        order = self._order(order_id)
        sent_to = self._row("SELECT street, city, postcode FROM addresses WHERE order_id = ?", order_id)
        found = {
            "status": "ok",
            "order": {column: order[column] for column in _SHOWN},
            "address": dict(sent_to or {"city": order["city"], "postcode": order["postcode"]}),
        }
        for part, columns in _PARTS.items():
            table = "order_items JOIN products USING (sku)" if part == "items" else part
            rows = self._do(f"SELECT {columns} FROM {table} WHERE order_id = ? ORDER BY 1", order_id)
            found[part] = [dict(row) for row in rows]
        return found

    # Changing: a plan says what would happen, or refuses; `confirm` makes the plan anew and carries it out

    @_tool("order_id", order_id=_ORDER)
    def cancel_order(self, order_id):
        """Propose to cancel a whole order that is still processing, and to refund it."""
        return self._propose("cancel_order", order_id=order_id)

    def _plan_cancel_order(self, order_id):
        order = self._order(order_id)
        self._processing(order)

        def act():
            for item in self._items(order_id):
                self._do("UPDATE products SET stock = stock + ? WHERE sku = ?", item["quantity"], item["sku"])
            self._set_status(order_id, "cancelled")
            return self._refund(order, "cancelled")

        return f"Cancel order {order_id} and refund {order['total']:.2f} pounds.", act

    @_tool(
        "order_id street city postcode",
        order_id=_ORDER,
        street={**_TEXT, "description": "house and street"},
        city=_TEXT,
        postcode=_TEXT,
    )
    def change_address(self, order_id, street, city, postcode):
        """Propose another delivery address in the same country, for an order that is still processing."""
        return self._propose("change_address", order_id=order_id, street=street, city=city, postcode=postcode)

    def _plan_change_address(self, order_id, street, city, postcode):
        order = self._order(order_id)
        self._processing(order)
        if not fits_country(postcode, order["country"]):
            raise _Refused(
                "order-changes",
                f"An address can only be changed within one country, and {postcode!r} is no postcode of"
                f" {order['country']}.",
            )

        def act():
            self._do("INSERT OR REPLACE INTO addresses VALUES (?, ?, ?, ?)", order_id, street, city, postcode)
            return {}

        return f"Send order {order_id} to {street}, {city}, {postcode}.", act

    @_tool("order_id sku", order_id=_ORDER, sku=_SKU, size=_TEXT, colour=_TEXT)
    def change_item(self, order_id, sku, size=None, colour=None):
        """Propose another size or colour of an item, in an order that is still processing."""
        if not (size or colour):
            raise ValueError("change_item: give a size, a colour or both")
        return self._propose("change_item", order_id=order_id, sku=sku, size=size, colour=colour)

    def _plan_change_item(self, order_id, sku, size, colour):
        self._processing(self._order(order_id))
        item = self._item(order_id, sku)
        specs = json.loads(item["specs"])
        for what, value in (("sizes", size), ("colours", colour)):
            made = specs.get(what, [])
            if isinstance(made, str):  # footwear: "EU 36-48"
                low, high = map(int, re.search(r"(\d+)-(\d+)", made).groups())
                made = [str(number) for number in range(low, high + 1)]
            if value is not None and value not in made:
                raise _Refused("order-changes", f"{item['name']} is not made in {value}: {', '.join(made)}.")
        size, colour = size or item["size"], colour or item["colour"]

        def act():
            self._do(
                "UPDATE order_items SET size = ?, colour = ? WHERE order_id = ? AND sku = ?",
                size,
                colour,
                order_id,
                sku,
            )
            return {}

        return f"Change {item['name']} to {' '.join(filter(None, (size, colour)))}.", act

    @_tool(
        "order_id sku unused",
        order_id=_ORDER,
        sku=_SKU,
        unused={
            "type": "boolean",
            "description": "does the customer say that it is unused, with its tags on?",
        },
    )
    def start_return(self, order_id, sku, unused):
        """Propose to take back an unused item that was delivered, all pieces of it, and to send a label.

        Not for what arrived damaged or wrong, which needs photos and a person's decision.
        """
        return self._propose("start_return", order_id=order_id, sku=sku, unused=unused)

    def _plan_start_return(self, order_id, sku, unused):
        order, item = self._order(order_id), self._item(order_id, sku)
        if order["status"] != "delivered":
            raise _Refused(
                "returns", f"Only what was delivered can come back; the order is {order['status']}."
            )
        if self._count("returns", "order_id = ? AND sku = ?", order_id, sku):
            raise _Refused("returns", "This return has been opened already; the label was sent.")
        if item["name"].startswith(("Merino Briefs", "Gas Canister")):
            raise _Refused("returns", f"{item['name']} cannot be returned.")
        if not unused:
            raise _Refused("returns", "Only unused items can be returned. If it is faulty, see the warranty.")
        allowed = 90 if order["club"] == "trail_club" else 45
        days = (self.today - date.fromisoformat(order["delivered"])).days
        if days > allowed:
            raise _Refused(
                "returns", f"It was delivered {days} days ago, and returns end after {allowed} days."
            )
        cost = 0.0 if order["country"] == "GB" else EU_RETURN
        pays = "store credit" if item["last_chance"] else "refund"

        def act():
            self._write("returns", order_id, sku, self.today.isoformat(), cost, pays)
            return {"cost": cost, "pays": pays}

        return f"Return {item['name']} for a {pays}; the return costs {cost:.2f} pounds.", act

    @_tool("order_id wish", order_id=_ORDER, wish={"type": "string", "enum": ["resend", "refund"]})
    def settle_lost_order(self, order_id, wish):
        """Propose what the customer chose for a parcel that counts as lost: the same again, or a refund."""
        return self._propose("settle_lost_order", order_id=order_id, wish=wish)

    def _plan_settle_lost_order(self, order_id, wish):
        order = self._order(order_id)
        if order["status"] != "lost":
            raise _Refused(
                "tracking",
                f"The order is {order['status']}, not lost."
                " A parcel counts as lost after 5 working days without a scan.",
            )
        if self._count("refunds", "order_id = ?", order_id):
            raise _Refused("compensation", "The refund waits for a second person's signature already.")
        if wish == "refund":

            def act():
                if order["total"] <= REFUND_LIMIT:
                    self._set_status(order_id, "refunded")
                return self._refund(order, "lost")

            return f"Refund {order['total']:.2f} pounds for the lost order {order_id}.", act
        items = self._items(order_id)
        if self._count("resends", "order_id = ?", order_id):
            raise _Refused("tracking", "It was sent again once already. A person has to look at this.")
        short = [item["name"] for item in items if item["stock"] < item["quantity"]]
        if short:
            raise _Refused("tracking", f"{', '.join(short)} is not in stock. You can have a refund.")

        def act():
            for item in items:
                self._do("UPDATE products SET stock = stock - ? WHERE sku = ?", item["quantity"], item["sku"])
            self._write("resends", order_id, self.today.isoformat())
            self._do(
                "UPDATE orders SET status = 'processing', carrier = NULL, tracking = NULL,"
                " shipped = NULL WHERE order_id = ?",
                order_id,
            )
            return {}

        return f"Send the things of order {order_id} again.", act

    @_tool(
        "order_id amount reason",
        order_id=_ORDER,
        amount={
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1000,
            "description": "pounds: 5, 10 or at most 15",
        },
        reason={"type": "string", "enum": list(CREDIT_REASONS)},
    )
    def give_credit(self, order_id, amount, reason):
        """Propose store credit as goodwill, at most 15.00 for a case, after the fault has been put right."""
        return self._propose("give_credit", order_id=order_id, amount=round(float(amount), 2), reason=reason)

    def _plan_give_credit(self, order_id, amount, reason):
        order = self._order(order_id)
        if not amount >= 0.01:
            raise _Refused("compensation", "A credit is at least a penny.")
        if self._count("credits", "order_id = ? AND reason = ?", order_id, reason):
            raise _Refused("compensation", "A credit for this reason has been given already.")
        for column, value in (("case_id", self.case_id), ("order_id", order_id)):
            given = self._row(f"SELECT total(amount) AS sum FROM credits WHERE {column} = ?", value)["sum"]
            if round(given + amount, 2) > CREDIT_LIMIT:
                raise _Refused("compensation", "Our team lead has to decide about that amount.")
        if reason == "lost_parcel":
            lost = order["status"] == "lost" or self._count("resends", "order_id = ?", order_id)
            lost = lost or self._count("refunds", "order_id = ? AND reason = 'lost'", order_id)
            if not lost or (self.today - date.fromisoformat(order["placed"])).days <= 7:
                raise _Refused("compensation", "The parcel is not lost, or you have not waited for a week.")

        def act():
            self._write("credits", order_id, reason, self.case_id, amount, self.today.isoformat())
            return {"amount": amount, "lasts": "24 months"}

        return f"Put {amount:.2f} pounds of store credit into the account, which lasts 24 months.", act

    @_tool("token", token={"type": "string", "description": "from a proposal of this case", "maxLength": 40})
    def confirm(self, token):
        """Carry out a proposal, after the customer has agreed to its summary."""
        row = self._row("SELECT * FROM proposals WHERE token = ? AND case_id = ?", token, self.case_id)
        if row is None:
            raise _Refused("order-changes", "There is no such proposal in this case.")
        if row["result"]:
            return json.loads(row["result"])
        summary, act = getattr(self, f"_plan_{row['tool']}")(**json.loads(row["arguments"]))
        result = {"status": "done", "tool": row["tool"], "summary": summary, **act()}
        self._do("UPDATE proposals SET result = ? WHERE token = ?", json.dumps(result), token)
        return result

    # Handing over

    @_tool(
        "sign summary",
        sign={"type": "string", "enum": list(SIGNS)},
        summary={
            "type": "string",
            "minLength": 1,
            "maxLength": 1000,
            "description": "what the person must know",
        },
        order_id=_ORDER,
    )
    def escalate(self, sign, summary, order_id=""):
        """Hand the case to a person, because of danger, a legal threat, the press, distress, fraud and so on.

        Needs no identity. The facts of the case are added by the desk: who the customer is and what was done.
        With "fraud" the account is locked: for the customer of the case, or of `order_id` where nobody is
        known yet.
        """
        goes_to, within = SIGNS[sign]
        order = self._row("SELECT customer_id FROM orders WHERE order_id = ?", order_id)
        customer_id = self.customer_id or (order and order["customer_id"])
        done = self._do(
            "SELECT tool, arguments, status FROM audit WHERE case_id = ? ORDER BY n", self.case_id
        )
        facts = {"customer_id": self.customer_id, "order_id": order_id, "calls": [list(row) for row in done]}
        self._do(
            "INSERT INTO escalations VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            self.case_id,
            sign,
            goes_to,
            within,
            customer_id,
            summary,
            json.dumps(facts),
            self.today.isoformat(),
        )
        return {"status": "done", "tool": "escalate", "sign": sign, "goes_to": goes_to, "within": within}

    def sign(self, order_id: str, by: str) -> None:
        """Pay a refund that waits for a second person's signature. For staff, not a tool.

        by: who signs. Raises ValueError where `by` is empty or nothing waits.
        """
        order_id = _order_number(order_id)
        waits = self._count("refunds", "order_id = ? AND state <> 'paid'", order_id)
        if not waits or not by.strip():
            raise ValueError(f"no refund of {order_id!r} waits for a signature by {by!r}")
        with self._transaction():
            self._do("UPDATE refunds SET state = 'paid', signed_by = ? WHERE order_id = ?", by, order_id)
            if self._row("SELECT reason FROM refunds WHERE order_id = ?", order_id)["reason"] == "lost":
                self._set_status(order_id, "refunded")

    # What the tools stand on

    @property
    def customer_id(self) -> str | None:
        """The customer who has said who they are in this case, or None."""
        return self._row("SELECT customer_id FROM cases WHERE case_id = ?", self.case_id)["customer_id"]

    def _propose(self, tool, **arguments):
        """A proposal under a token that stays the same until something has been done in the case."""
        summary, _ = getattr(self, f"_plan_{tool}")(**arguments)
        done = self._count("proposals", "case_id = ? AND result IS NOT NULL", self.case_id)
        text = json.dumps(arguments)
        token = hashlib.sha256(f"{self.case_id} {done} {tool} {text}".encode()).hexdigest()[:10]
        self._do(
            "INSERT INTO proposals VALUES (?, ?, ?, ?, NULL) ON CONFLICT DO NOTHING",
            token,
            self.case_id,
            tool,
            text,
        )
        return {"status": "proposed", "token": token, "summary": summary}

    def _open(self):
        """Refuse whatever an urgent hand-off has stopped, in this case or for this customer's account."""
        urgent = f"sign IN ({', '.join(map(repr, URGENT))})"
        if self._count("escalations", f"case_id = ? AND {urgent}", self.case_id):
            raise _Refused("escalation", "A person has taken over this case.")
        if self._count("escalations", "sign = 'fraud' AND customer_id = ?", self.customer_id):
            raise _Refused("escalation", "The account is locked until a person has checked it.")

    def _order(self, order_id):
        """An order of the identified customer, with that customer's club and country."""
        self._open()
        order = self._row(
            "SELECT * FROM orders JOIN customers USING (customer_id) WHERE order_id = ? AND customer_id = ?",
            order_id,
            self.customer_id,
        )
        if self.customer_id is None:
            raise _Refused("privacy", "Please tell me who you are first: order number and postcode or email.")
        if order is None:
            raise _Refused("privacy", f"There is no order {order_id} among this customer's orders.")
        return order

    def _items(self, order_id):
        return self._do(
            "SELECT * FROM order_items JOIN products USING (sku) WHERE order_id = ?", order_id
        ).fetchall()

    def _item(self, order_id, sku):
        for item in self._items(order_id):
            if item["sku"] == sku:
                return item
        held = ", ".join(f"{item['sku']} ({item['name']})" for item in self._items(order_id))
        raise _Refused("order-changes", f"The order holds no {sku}. It holds {held}.")

    def _processing(self, order):
        if order["status"] != "processing":
            raise _Refused(
                "order-changes",
                f"The order is {order['status']}, and only an order in processing"
                " can be changed or cancelled.",
            )

    def _refund(self, order, reason):
        state = "paid" if order["total"] <= REFUND_LIMIT else "waits for a signature"
        if order["total"] > 0:
            self._write(
                "refunds", order["order_id"], order["total"], reason, self.today.isoformat(), None, state
            )
        return {"refund": order["total"], "state": state}

    def _set_status(self, order_id, status):
        self._do("UPDATE orders SET status = ? WHERE order_id = ?", status, order_id)

    def _do(self, query, *values):
        return self.connection.execute(query, values)

    def _row(self, query, *values):
        return self._do(query, *values).fetchone()

    def _count(self, table, where, *values):
        return self._row(f"SELECT count(*) AS n FROM {table} WHERE {where}", *values)["n"]

    def _write(self, table, *values):
        marks = ", ".join("?" for _ in values)
        return self.connection.execute(f"INSERT INTO {table} VALUES ({marks})", values).lastrowid

    def _transaction(self):
        """Everything or nothing, and nobody else in between."""
        if not self.connection.in_transaction:
            self.connection.execute("BEGIN IMMEDIATE")
        return self.connection


def _order_number(text):
    """An order number as people type it ("fw10759", "10759"), as the shop writes it."""
    match = re.fullmatch(r"\s*#?(?:FW)?[-\s]*(\d{5})\s*", text, re.IGNORECASE)
    return f"FW-{match[1]}" if match else text.strip()
