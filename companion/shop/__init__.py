"""Fernway, the company of the course: its catalogue, orders, policies and conversations, and their loaders.

Fernway is an outdoor retailer in Bristol with a web shop, a workshop and six people in support. It does not
exist: company, customers, orders and letters are invented, and its addresses end in `.example`, where
nothing can live. All records agree with each other. An order's items add up to its total, a ticket about an
order comes from the customer who placed it, and an article states the number that a good answer needs. In
Fernway's world it is `TODAY`. Prices are in pounds with VAT, dates without a time zone.

    products() customers() orders() order_items()     the shop's tables, as pandas frames
    database()                                        the same tables in SQLite, to be changed without harm
    articles()                                        policies and advice, to be searched and quoted
    tickets()                                         600 letters to support, labelled and split
    dialogues() sales_calls() leads()                 conversations and enquiries

Each call reads its files anew, so a change to what it returns changes nothing else. This module holds data
and no behaviour: it looks nothing up, answers nobody and knows of no model. What may be done with an order
is in `companion.shop.systems`.

The texts are under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), the code under the package's
licence.
"""

import csv
import json
import sqlite3
from datetime import date
from importlib.resources import files
from pathlib import Path

TODAY = date(2026, 11, 20)

INTENT_DESCRIPTIONS = {
    "order_status": "where the parcel is, when it comes, why tracking does not move",
    "change_order": "change address, size or items, or cancel, before the parcel leaves",
    "return_item": "send something back, get a label, exchange for another size",
    "refund_status": "has sent it back or was promised money, and asks where the money is",
    "damaged_item": "arrived broken or failed within days, or came with parts missing through damage",
    "wrong_item": "got another product, size or colour than ordered, or an item is missing",
    "warranty_repair": "failed after use: warranty claim, repair, spare part",
    "product_question": "asks before buying: fit, size, material, compatibility, stock, recommendation",
    "payment_problem": "charged twice, card declined, invoice, VAT, Klarna, gift card refused at checkout",
    "discount_loyalty": "promo code, price promise, Trail Club points, gift card balance",
    "account_access": "login, password, email change, two-factor, delete the account or its data",
    "business_order": "order for a group, school or company: bulk price, logo, invoice terms",
}
INTENTS = tuple(INTENT_DESCRIPTIONS)

_DATA = files(__package__) / "data"
_SPLITS = ("train", "validation", "test", None)
_AUDIENCES = ("public", "internal", None)

_SCHEMA = """
CREATE TABLE products (
    sku TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    category TEXT NOT NULL,
    price REAL NOT NULL CHECK (price > 0),
    stock INTEGER NOT NULL CHECK (stock >= 0),
    short TEXT NOT NULL,
    description TEXT NOT NULL,
    weight_g INTEGER NOT NULL CHECK (weight_g > 0),
    specs TEXT NOT NULL CHECK (json_valid(specs)),
    goes_with TEXT NOT NULL,
    last_chance INTEGER NOT NULL CHECK (last_chance IN (0, 1)));
CREATE TABLE customers (
    customer_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    email TEXT NOT NULL UNIQUE,
    city TEXT NOT NULL,
    postcode TEXT NOT NULL,
    country TEXT NOT NULL CHECK (length(country) = 2),
    club TEXT NOT NULL CHECK (club IN ('none', 'trail_club')),
    since TEXT NOT NULL);
CREATE TABLE orders (
    order_id TEXT PRIMARY KEY,
    customer_id TEXT NOT NULL REFERENCES customers,
    placed TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('processing', 'packed', 'shipped', 'delayed', 'delivered', 'lost',
                                           'returned', 'refunded', 'cancelled')),
    shipping TEXT NOT NULL CHECK (shipping IN ('standard', 'express')),
    shipping_cost REAL NOT NULL CHECK (shipping_cost >= 0),
    total REAL NOT NULL CHECK (total >= 0),
    payment TEXT NOT NULL CHECK (payment IN ('card', 'paypal', 'klarna')),
    carrier TEXT,
    tracking TEXT,
    shipped TEXT CHECK (shipped >= placed),
    delivered TEXT CHECK (delivered >= shipped));
CREATE TABLE order_items (
    order_id TEXT NOT NULL REFERENCES orders,
    sku TEXT NOT NULL REFERENCES products,
    quantity INTEGER NOT NULL CHECK (quantity > 0),
    size TEXT,
    colour TEXT,
    unit_price REAL NOT NULL CHECK (unit_price > 0),
    PRIMARY KEY (order_id, sku));
"""


def products():
    """The 52 products: a frame with sku, name, category, price (GBP), stock (pieces), short (a sentence),
    description, weight_g (grams), specs (a dict: sizes, colours, volume, ...; keys differ by product),
    goes_with (skus, separated by spaces) and last_chance (bool: returned for exchange or store credit only).
    """
    frame = _table("products", price=float, stock=int, weight_g=int)
    frame["specs"] = frame["specs"].map(json.loads)
    frame["last_chance"] = frame["last_chance"] == "1"
    return frame


def customers():
    """The 80 customers: a frame with customer_id, name, email, city, postcode, country (ISO 3166, two
    letters), club ("trail_club" or "none") and since (date of the account)."""
    return _table("customers", dates=["since"])


def orders():
    """The 200 orders as they stand on `TODAY`: a frame with order_id, customer_id, placed, status
    ("processing", "packed", "shipped", "delayed", "delivered", "lost", "returned", "refunded",
    "cancelled"), shipping ("standard", "express"), shipping_cost and total (GBP), payment ("card",
    "paypal", "klarna"), carrier, tracking, shipped and delivered. Dates that have not come are NaT, texts
    that are missing are "".
    """
    return _table("orders", dates=["placed", "shipped", "delivered"], shipping_cost=float, total=float)


def order_items():
    """What the orders hold: a frame with order_id, sku, quantity, size, colour ("" where the product has
    none) and unit_price (GBP). One row for each product of an order.
    """
    return _table("order_items", quantity=int, unit_price=float)


def articles(audience="public"):
    """Policy and help articles, sorted by id.

    audience: "public" for what customers may read, "internal" for support's own rules, None for both. An
    assistant that talks to customers should search the public ones only.

    Returns a list of dicts with id, title, audience, updated (ISO date) and text (Markdown).
    """
    _check("audience", audience, _AUDIENCES)
    found = []
    for file in sorted((_DATA / "articles").iterdir(), key=lambda file: file.name):
        _, head, text = file.read_text(encoding="utf-8").split("---\n", 2)
        article = dict(line.split(": ", 1) for line in head.splitlines())
        if audience in (None, article["audience"]):
            found.append({**article, "text": text.strip()})
    return found


def tickets(split=None):
    """The 600 tickets, 50 for each of `INTENTS`, sorted by id.

    split: "train" (420), "validation" (72), "test" (108), or None for all. Every intent has the same share
    in each, and no ticket has a near twin on another side.

    Returns a frame with id, channel ("email", "chat", "web_form", "social"), language, customer_id,
    created, subject, text, intent, second_intent, urgency ("low", "normal", "high"), sentiment ("positive",
    "neutral", "frustrated", "angry"), slots (a dict of what the subject or the text states: order_id,
    product, size, colour, email, amount in GBP, date, postcode, code, quantity, country), safety (bool:
    injury or danger) and split. What is missing is NaN.
    """
    _check("split", split, _SPLITS)
    import pandas as pd

    frame = pd.DataFrame(ticket for ticket in _records("tickets") if split in (None, ticket["split"]))
    frame["created"] = pd.to_datetime(frame["created"])
    return frame


def dialogues():
    """The 60 conversations with support and sales: a list of dicts with id, kind ("service", "sales"),
    customer_id, date, intent, outcome ("resolved", "refused", "escalated", "abandoned", "sold",
    "not_sold"), policies (ids of the articles that were needed), order_id and messages, each with role
    ("user", "assistant") and content.
    """
    return _records("dialogues")


def leads():
    """The 80 enquiries to sales: a list of dicts with id, created, source ("web_form", "phone",
    "trade_fair", "referral", "email"), name, organisation, country, message, need (skus or categories),
    quantity (pieces of the first need), budget (GBP), deadline (ISO date), decision_maker, stage ("new",
    "qualified", "quoted", "won", "lost"), label and next_step. A field is None where the message does not
    say.

    The label is "hot" where somebody can decide, knows what they need and has a date or a sum; "warm" where
    the need is real and one of these is open; "cold" where little will come of it; "not_a_lead" for
    everything else, such as spam, sellers, job seekers and tickets gone astray.
    """
    return _records("leads")


def sales_calls():
    """The 12 sales calls: a list of dicts with id, date, customer, organisation, turns, each with speaker
    ("rep", "customer") and text, and crm, the note a good rep writes after it: need (skus), quantity
    (pieces of the first need), budget (GBP), deadline (ISO date), objections and next_step.
    """
    return _records("sales_calls")


def database(path=":memory:"):
    """The four tables in a new SQLite database, with their constraints.

    path: where to write it; by default it lives in memory and ends with the connection. Every call starts
    from the same state, so what one lesson changes, the next one does not see.

    Returns a `sqlite3.Connection` whose rows are `sqlite3.Row` and whose foreign keys are enforced. Columns
    are those of the frames; dates are ISO texts, `specs` is JSON text, what is missing is NULL. Raises
    FileExistsError where `path` exists.
    """
    if str(path) != ":memory:" and Path(path).exists():
        raise FileExistsError(f"{path} exists already: choose another path, or delete it first")
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.executescript(_SCHEMA)
    for name in ("products", "customers", "orders", "order_items"):
        with (_DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        marks = ", ".join("?" for _ in header)
        connection.executemany(
            f"INSERT INTO {name} VALUES ({marks})", ([value or None for value in row] for row in rows)
        )
    connection.commit()
    return connection


def _table(name, dates=(), **dtypes):
    """A CSV file as a frame: all columns text, but for `dates` and `dtypes`."""
    import pandas as pd

    with (_DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    return frame.astype(dtypes).assign(**{column: pd.to_datetime(frame[column]) for column in dates})


def _records(name):
    """A JSON Lines file as a list of dicts."""
    return [json.loads(line) for line in (_DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _check(name, value, legal):
    """Refuse an argument outside `legal`."""
    if value not in legal:
        raise ValueError(f"{name} is {value!r}, but should be one of {', '.join(map(repr, legal))}")
