"""The desk keeps Fernway's rules, whatever is asked of it and in whatever order."""

import json
import random
import sqlite3
from datetime import date, timedelta

import pytest
from jsonschema import Draft202012Validator

from companion import shop
from companion.shop import systems
from companion.shop.systems import Desk, schemas

PROCESSING, PACKED, LOST, DELAYED = "FW-10768", "FW-10751", "FW-10213", "FW-10704"
DEAR, DEAR_LOST = "FW-10772", "FW-10269"  # above 150 pounds


@pytest.fixture()
def connection():
    connection = shop.database()
    yield connection
    connection.close()


def known(connection, order_id, **options):
    """A desk whose customer has named an order of theirs and its postcode."""
    row = connection.execute(
        "SELECT postcode FROM orders JOIN customers USING (customer_id) WHERE order_id = ?", (order_id,)
    ).fetchone()
    desk = Desk(connection, **options)
    assert desk.find_orders(order_id=order_id, postcode=row["postcode"])["status"] == "ok"
    return desk


def value(connection, query, *values):
    return connection.execute(query, values).fetchone()[0]


def delivered(connection, days, club="none", where="TRUE"):
    """An order, with an item of it, that was delivered so many days ago, as the shop would know it."""
    row = connection.execute(
        "SELECT order_id, sku FROM orders JOIN customers USING (customer_id)"
        " JOIN order_items USING (order_id) JOIN products USING (sku)"
        f" WHERE status = 'delivered' AND club = ? AND {where} ORDER BY 1, 2",
        (club,),
    ).fetchone()
    day = (shop.TODAY - timedelta(days)).isoformat()
    connection.execute(
        "UPDATE orders SET delivered = ?, shipped = ?, placed = ? WHERE order_id = ?",
        (day, day, day, row["order_id"]),
    )
    connection.commit()
    return row["order_id"], row["sku"]


# Who is asking?


@pytest.mark.parametrize(
    "facts",
    [
        {"order_id": PROCESSING, "postcode": "NR2 3TT"},
        {"order_id": "fw 10768", "postcode": "nr23tt"},
        {"order_id": "10768", "email": "GarethPug@homenet.example "},
        {"email": "garethpug@homenet.example", "postcode": "NR2 3TT"},
    ],
)
def test_two_facts_that_belong_together_identify_a_customer(connection, facts):
    desk = Desk(connection)
    found = desk.find_orders(**facts)
    assert found["customer"] == "Gareth Pugh"
    assert {order["order_id"] for order in found["orders"]} >= {PROCESSING, "FW-10778"}
    assert desk.customer_id == "C008"


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"order_id": PROCESSING},
        {"email": "garethpug@homenet.example"},
        {"order_id": PROCESSING, "postcode": " "},
        {"order_id": PROCESSING, "postcode": "IV2 3DQ"},
        {"order_id": PROCESSING, "email": "%"},
        {"order_id": "FW-99999", "postcode": "NR2 3TT"},
        {"order_id": PACKED, "email": "garethpug@homenet.example"},
        {"order_id": PROCESSING, "postcode": "' OR 1=1 --"},
    ],
)
def test_anything_less_shows_nothing(connection, facts):
    desk = Desk(connection)
    answer = desk.find_orders(**facts)
    assert (answer["status"], answer["policy"]) == ("refused", "privacy")
    assert desk.customer_id is None
    assert desk.order_status(order_id=PROCESSING)["policy"] == "privacy"
    assert "Pugh" not in json.dumps(answer)


def test_a_wrong_order_number_and_a_wrong_postcode_look_the_same(connection):
    desk = Desk(connection)
    wrong = desk.find_orders(order_id="FW-99999", postcode="NR2 3TT")
    assert wrong == desk.find_orders(order_id=PROCESSING, postcode="AB1 2CD")


def test_a_postcode_cannot_be_guessed_for_long(connection):
    desk = Desk(connection)
    for n in range(systems.ATTEMPTS):
        desk.find_orders(order_id=PROCESSING, postcode=f"NR{n} 1AA")
    assert desk.find_orders(order_id=PROCESSING, postcode="NR2 3TT")["status"] == "refused"
    assert desk.customer_id is None


def test_a_case_stays_with_one_customer(connection):
    desk = known(connection, PROCESSING)
    assert desk.find_orders(order_id=PACKED, postcode="LL57 2DG")["status"] == "refused"
    assert desk.customer_id == "C008"
    assert desk.order_status(order_id=PACKED)["policy"] == "privacy"
    assert desk.cancel_order(order_id=PACKED)["policy"] == "privacy"


def test_order_status_says_what_the_shop_knows(connection):
    answer = known(connection, DELAYED).order_status(order_id="10704")
    assert answer["order"]["status"] == "delayed"
    assert answer["order"]["carrier"] == "NorthPost"
    assert sum(item["quantity"] * item["unit_price"] for item in answer["items"]) == answer["order"]["total"]


# Two steps


def test_a_proposal_changes_nothing_and_a_confirmed_one_does(connection):
    desk = known(connection, PROCESSING)
    proposal = desk.cancel_order(order_id=PROCESSING)
    assert proposal["status"] == "proposed" and "52.95" in proposal["summary"]
    assert value(connection, "SELECT status FROM orders WHERE order_id = ?", PROCESSING) == "processing"
    done = desk.confirm(token=proposal["token"])
    assert (done["status"], done["refund"], done["state"]) == ("done", 52.95, "paid")
    assert value(connection, "SELECT status FROM orders WHERE order_id = ?", PROCESSING) == "cancelled"


def test_a_repeated_confirmation_gives_the_same_answer_and_pays_once(connection):
    desk = known(connection, PROCESSING)
    token = desk.cancel_order(order_id=PROCESSING)["token"]
    stock = "SELECT sum(stock) FROM products"
    first = desk.confirm(token=token)
    after = value(connection, stock)
    assert desk.confirm(token=token) == first
    assert value(connection, stock) == after
    assert value(connection, "SELECT count(*) FROM refunds") == 1
    assert desk.cancel_order(order_id=PROCESSING)["policy"] == "order-changes"


def test_the_rules_are_checked_again_at_the_second_step(connection):
    desk = known(connection, PROCESSING)
    token = desk.cancel_order(order_id=PROCESSING)["token"]
    connection.execute("UPDATE orders SET status = 'packed' WHERE order_id = ?", (PROCESSING,))
    connection.commit()
    assert desk.confirm(token=token)["policy"] == "order-changes"
    assert value(connection, "SELECT count(*) FROM refunds") == 0


def test_a_token_is_worth_nothing_in_another_case(connection):
    token = known(connection, PROCESSING).cancel_order(order_id=PROCESSING)["token"]
    assert known(connection, PROCESSING).confirm(token=token)["status"] == "refused"
    assert Desk(connection).confirm(token=token)["status"] == "refused"


def test_the_same_proposal_has_the_same_token_until_something_was_done(connection):
    desk = known(connection, PROCESSING)
    one = {"street": "1 Hill Road", "city": "Norwich", "postcode": "NR1 1AA"}
    two = {**one, "street": "2 Hill Road"}
    first = desk.change_address(order_id=PROCESSING, **one)
    assert desk.change_address(order_id=PROCESSING, **one) == first
    for address in (one, two, one):
        desk.confirm(token=desk.change_address(order_id=PROCESSING, **address)["token"])
        assert desk.order_status(order_id=PROCESSING)["address"] == address


# Policies


@pytest.mark.parametrize("postcode", ["10117", "H91 X2YT", "75008", "?"])
def test_an_address_stays_in_its_country(connection, postcode):
    desk = known(connection, PROCESSING)
    answer = desk.change_address(order_id=PROCESSING, street="1 Main St", city="Berlin", postcode=postcode)
    assert (answer["status"], answer["policy"]) == ("refused", "order-changes")
    assert repr(postcode) in answer["reason"]


def test_every_customers_own_postcode_is_one_of_their_country(connection):
    rows = connection.execute("SELECT country, postcode FROM customers").fetchall()
    assert all(systems.fits_country(row["postcode"], row["country"]) for row in rows)


@pytest.mark.parametrize("order_id", [PACKED, DELAYED, LOST])
def test_an_order_that_has_moved_on_is_not_changed(connection, order_id):
    desk = known(connection, order_id)
    sku = desk.order_status(order_id=order_id)["items"][0]["sku"]
    address = {"street": "1 Hill Road", "city": "Norwich", "postcode": "NR1 1AA"}
    for answer in (
        desk.cancel_order(order_id=order_id),
        desk.change_address(order_id=order_id, **address),
        desk.change_item(order_id=order_id, sku=sku, size="M"),
    ):
        assert (answer["status"], answer["policy"]) == ("refused", "order-changes")


def test_an_item_is_changed_to_what_is_made_only(connection):
    sized = (
        "SELECT order_id, sku, size FROM order_items JOIN orders USING (order_id) WHERE status = 'processing'"
    )
    row = next(row for row in connection.execute(sized) if row["size"])
    desk = known(connection, row["order_id"])
    made = [size for size in ("S", "XL", "41", "45") if size != row["size"]]
    answers = {size: desk.change_item(order_id=row["order_id"], sku=row["sku"], size=size) for size in made}
    assert {answer["status"] for answer in answers.values()} == {"proposed", "refused"}
    right = next(size for size, answer in answers.items() if answer["status"] == "proposed")
    desk.confirm(token=answers[right]["token"])
    query = "SELECT size FROM order_items WHERE order_id = ? AND sku = ?"
    assert value(connection, query, row["order_id"], row["sku"]) == right


@pytest.mark.parametrize(
    ("club", "days", "status"),
    [
        ("none", 45, "proposed"),
        ("none", 46, "refused"),
        ("trail_club", 90, "proposed"),
        ("trail_club", 91, "refused"),
    ],
)
def test_returns_end_with_the_last_day_of_the_policy(connection, club, days, status):
    order_id, sku = delivered(connection, days, club, "sku NOT IN ('FW-505', 'FW-704')")
    answer = known(connection, order_id).start_return(order_id=order_id, sku=sku, unused=True)
    assert answer["status"] == status
    assert status == "proposed" or answer["policy"] == "returns"


@pytest.mark.parametrize(
    ("where", "cost", "pays"),
    [
        ("country = 'GB' AND last_chance = 0 AND sku <> 'FW-505'", 0, "refund"),
        ("country <> 'GB' AND last_chance = 0 AND sku <> 'FW-505'", 6.95, "refund"),
        ("country = 'GB' AND last_chance = 1", 0, "store credit"),
    ],
)
def test_a_return_costs_and_pays_what_the_policy_says(connection, where, cost, pays):
    order_id, sku = delivered(connection, 5, where=where)
    desk = known(connection, order_id)
    done = desk.confirm(token=desk.start_return(order_id=order_id, sku=sku.lower(), unused=True)["token"])
    assert (done["cost"], done["pays"]) == (cost, pays)
    assert desk.start_return(order_id=order_id, sku=sku, unused=True)["status"] == "refused"
    assert desk.order_status(order_id=order_id)["returns"] == [{"sku": sku, "pays": pays, "cost": cost}]


def test_what_cannot_come_back_is_refused(connection):
    order_id, sku = delivered(connection, 5, where="sku = 'FW-505'")
    assert (
        known(connection, order_id).start_return(order_id=order_id, sku=sku, unused=True)["policy"]
        == "returns"
    )
    order_id, sku = delivered(connection, 5, where="sku = 'FW-601'")
    desk = known(connection, order_id)
    assert desk.start_return(order_id=order_id, sku=sku, unused=False)["policy"] == "returns"
    assert "holds no" in desk.start_return(order_id=order_id, sku="FW-999", unused=True)["reason"]


def test_a_lost_parcel_is_refunded_or_sent_again(connection):
    desk = known(connection, LOST)
    done = desk.confirm(token=desk.settle_lost_order(order_id=LOST, wish="refund")["token"])
    assert (done["refund"], done["state"]) == (45.95, "paid")
    assert desk.settle_lost_order(order_id=LOST, wish="resend")["status"] == "refused"
    other = "FW-10350"
    desk = known(connection, other)
    done = desk.confirm(token=desk.settle_lost_order(order_id=other, wish="resend")["token"])
    assert done["status"] == "done"
    assert desk.order_status(order_id=other)["order"]["status"] == "processing"
    connection.execute("UPDATE orders SET status = 'lost' WHERE order_id = ?", (other,))  # once more
    connection.commit()
    assert desk.settle_lost_order(order_id=other, wish="resend")["policy"] == "tracking"
    assert desk.settle_lost_order(order_id=other, wish="refund")["status"] == "proposed"
    desk = known(connection, DELAYED)
    assert desk.settle_lost_order(order_id=DELAYED, wish="refund")["policy"] == "tracking"


def test_what_is_not_in_stock_is_not_sent_again(connection):
    connection.execute("UPDATE products SET stock = 0")
    connection.commit()
    answer = known(connection, LOST).settle_lost_order(order_id=LOST, wish="resend")
    assert answer["status"] == "refused" and "refund" in answer["reason"]


@pytest.mark.parametrize(("order_id", "after"), [(DEAR, "cancelled"), (DEAR_LOST, "refunded")])
def test_a_refund_above_150_pounds_waits_for_a_signature(connection, order_id, after):
    desk = known(connection, order_id)
    proposal = (
        desk.cancel_order(order_id=order_id)
        if order_id == DEAR
        else desk.settle_lost_order(order_id=order_id, wish="refund")
    )
    assert desk.confirm(token=proposal["token"])["state"] == "waits for a signature"
    waiting = "cancelled" if order_id == DEAR else "lost"
    assert desk.order_status(order_id=order_id)["order"]["status"] == waiting
    assert desk.settle_lost_order(order_id=order_id, wish="resend")["status"] == "refused"
    with pytest.raises(ValueError, match="signature"):
        desk.sign(order_id, by=" ")
    desk.sign(order_id, by="Team lead")
    assert desk.order_status(order_id=order_id)["refunds"][0]["state"] == "paid"
    assert desk.order_status(order_id=order_id)["order"]["status"] == after
    with pytest.raises(ValueError, match=order_id):
        desk.sign(order_id, by="Team lead")


def test_goodwill_stays_within_its_limit_for_the_case_and_for_the_order(connection):
    desk = known(connection, LOST)
    give = dict(order_id=LOST, reason="our_mistake")
    assert desk.give_credit(amount=15.01, **give)["policy"] == "compensation"
    desk.confirm(token=desk.give_credit(amount=10, **give)["token"])
    assert desk.give_credit(amount=1, **give)["status"] == "refused"  # the same reason
    assert desk.give_credit(order_id=LOST, amount=10, reason="lost_parcel")["status"] == "refused"
    second = known(connection, LOST)  # a new conversation, the same order
    assert second.give_credit(order_id=LOST, amount=10, reason="lost_parcel")["status"] == "refused"
    assert second.give_credit(order_id=LOST, amount=5, reason="lost_parcel")["status"] == "proposed"
    other = "FW-10400"  # another order of the same customer, in the first case
    assert desk.give_credit(order_id=other, amount=10, reason="our_mistake")["status"] == "refused"


def test_two_open_proposals_do_not_add_up_to_more_than_the_limit(connection):
    desk = known(connection, LOST)
    tokens = [
        desk.give_credit(order_id=LOST, amount=10, reason=reason)["token"]
        for reason in ("our_mistake", "lost_parcel")
    ]
    assert [desk.confirm(token=token)["status"] for token in tokens] == ["done", "refused"]


def test_a_credit_for_a_lost_parcel_needs_one(connection):
    answer = known(connection, DELAYED).give_credit(order_id=DELAYED, amount=5, reason="lost_parcel")
    assert (answer["status"], answer["policy"]) == ("refused", "compensation")


# Handing over


@pytest.mark.parametrize("sign", systems.URGENT)
def test_an_urgent_sign_stops_the_case(connection, sign):
    desk = known(connection, PROCESSING)
    token = desk.cancel_order(order_id=PROCESSING)["token"]
    answer = desk.escalate(sign=sign, summary="The stove flared up.")
    assert (answer["goes_to"], answer["within"]) == systems.URGENT[sign]
    for after in (
        desk.confirm(token=token),
        desk.order_status(order_id=PROCESSING),
        desk.find_orders(order_id=PROCESSING, postcode="NR2 3TT"),
    ):
        assert (after["status"], after["policy"]) == ("refused", "escalation")
    assert desk.escalate(sign=sign, summary="Again.") == answer
    assert value(connection, "SELECT count(*) FROM escalations") == 1


def test_a_case_in_the_normal_queue_goes_on(connection):
    desk = known(connection, PROCESSING)
    assert desk.escalate(sign="approval", summary="Wants 40 pounds.")["goes_to"] == "team lead"
    assert desk.order_status(order_id=PROCESSING)["status"] == "ok"


def test_suspected_fraud_locks_the_account_in_every_case(connection):
    Desk(connection).escalate(sign="fraud", summary="Not my order.", order_id=PROCESSING)
    other = Desk(connection)
    answer = other.find_orders(order_id="FW-10778", postcode="NR2 3TT")
    assert (answer["status"], answer["policy"]) == ("refused", "escalation")
    assert other.cancel_order(order_id=PROCESSING)["policy"] == "escalation"
    assert known(connection, PACKED).order_status(order_id=PACKED)["status"] == "ok"


def test_the_hand_off_carries_the_facts(connection):
    desk = known(connection, LOST)
    desk.confirm(token=desk.settle_lost_order(order_id=LOST, wish="refund")["token"])
    desk.escalate(sign="other", summary="Asks for the team lead.")
    row = connection.execute("SELECT * FROM escalations").fetchone()
    facts = json.loads(row["facts"])
    assert (row["summary"], facts["customer_id"]) == ("Asks for the team lead.", "C038")
    assert [call[0] for call in facts["calls"]] == ["find_orders", "settle_lost_order", "confirm"]


# As a model calls it


def test_the_schemas_are_what_the_methods_take(connection):
    assert [schema["function"]["name"] for schema in schemas()] == [
        name for name in vars(Desk) if hasattr(vars(Desk)[name], "__wrapped__")
    ]
    for schema in schemas():
        Draft202012Validator.check_schema(schema["function"]["parameters"])
        assert schema["function"]["description"]
    assert [s["function"]["name"] for s in schemas(["confirm", "escalate"])] == ["confirm", "escalate"]
    with pytest.raises(ValueError, match="refund_all"):
        schemas(["refund_all"])


def test_a_call_is_the_method_and_bad_calls_are_told_what_is_wrong(connection):
    desk = Desk(connection)
    answer = desk.call("find_orders", '{"order_id": "FW-10768", "postcode": "NR2 3TT"}')
    assert answer["customer"] == "Gareth Pugh"
    for name, arguments, told in [
        ("refund_all", "{}", "refund_all"),
        ("order_status", "not json", "Expecting value"),
        ("order_status", "[]", "JSON object"),
        ("order_status", "{}", "order_id"),
        ("order_status", '{"order_id": 10768}', "10768"),
        ("order_status", '{"order_id": "FW-10768", "self": 1}', "self"),
        ("settle_lost_order", '{"order_id": "FW-10768", "wish": "both"}', "both"),
        ("give_credit", {"order_id": PROCESSING, "amount": -5, "reason": "our_mistake"}, "-5"),
        ("give_credit", {"order_id": PROCESSING, "amount": 1e300, "reason": "our_mistake"}, "1e+300"),
        ("sign", {"order_id": PROCESSING, "by": "me"}, "sign"),
        ("find_orders", "[" * 100_000, "recursion"),
        ("find_orders", '{"order_id": "FW-10768", "postcode": "\\ud800"}', "surrogate"),
    ]:
        answer = desk.call(name, arguments)
        assert answer["status"] == "invalid", name
        assert told in answer["reason"]
    assert desk.call("give_credit", '{"order_id": "FW-10768", "amount": NaN, "reason": "our_mistake"}')[
        "status"
    ] == ("refused")
    with pytest.raises(ValueError, match="wish"):
        desk.settle_lost_order(order_id=LOST)


def test_a_connection_without_the_shop_is_named():
    with pytest.raises(ValueError, match=r"shop\.database"):
        Desk(sqlite3.connect(":memory:"))


def test_every_call_is_in_the_audit_trail(connection):
    desk = known(connection, PROCESSING)
    desk.order_status(order_id=PACKED)
    rows = connection.execute("SELECT tool, status FROM audit ORDER BY n").fetchall()
    assert [tuple(row) for row in rows] == [("find_orders", "ok"), ("order_status", "refused")]


# Any sequence of calls


def wish(rng, facts, mine, tokens):
    """A call that a customer, a model or an attacker might make, and often a sensible one about `mine`."""
    order_id, sku, email, postcode = mine if rng.random() < 0.85 else rng.choice(facts)
    if rng.random() < 0.1:
        order_id = rng.choice(facts)[0]
    reason = rng.choice(systems.CREDIT_REASONS)
    return rng.choice(
        [
            *[("find_orders", {"order_id": order_id, "postcode": postcode})] * 2,
            *[("find_orders", {"order_id": order_id, "email": email})] * 2,
            ("find_orders", {"order_id": order_id, "postcode": "AB1 2CD"}),
            ("order_status", {"order_id": order_id}),
            ("cancel_order", {"order_id": order_id}),
            ("change_item", {"order_id": order_id, "sku": sku, "size": rng.choice(["M", "44", "9"])}),
            ("change_address", {"order_id": order_id, "street": "x", "city": "y", "postcode": postcode}),
            ("start_return", {"order_id": order_id, "sku": sku, "unused": rng.random() < 0.8}),
            ("settle_lost_order", {"order_id": order_id, "wish": rng.choice(["resend", "refund"])}),
            ("give_credit", {"order_id": order_id, "amount": rng.choice([5, 10, 15, 40]), "reason": reason}),
            *[("confirm", {"token": rng.choice(tokens)})] * 6,
        ]
        if rng.random() < 0.99
        else [("escalate", {"sign": rng.choice(list(systems.SIGNS)), "summary": "?", "order_id": order_id})]
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_sequence_of_calls_breaks_a_policy(connection, seed):
    rng = random.Random(seed)
    rows = connection.execute(
        "SELECT order_id, sku, email, postcode FROM orders JOIN customers USING (customer_id)"
        " JOIN order_items USING (order_id) WHERE status IN ('processing', 'packed', 'lost', 'delayed')"
        " OR (status = 'delivered' AND delivered > '2026-09-20') ORDER BY 1, 2"
    ).fetchall()
    facts = [tuple(row) for row in rng.sample(rows, 8)]
    before = {row["order_id"]: dict(row) for row in connection.execute("SELECT * FROM orders")}
    stock = dict(tuple(row) for row in connection.execute("SELECT sku, stock FROM products"))
    owner = {order_id: row["customer_id"] for order_id, row in before.items()}
    open_case = lambda: (Desk(connection), rng.choice(facts), ["none"])  # noqa: E731
    cases, done = [open_case() for _ in range(3)], 0
    for _ in range(500):
        if rng.random() < 0.05:
            cases[rng.randrange(3)] = open_case()
        desk, mine, tokens = rng.choice(cases)
        name, arguments = wish(rng, facts, mine, rng.choice([tokens, tokens, cases[0][2]])[-3:])
        changes = None
        if name not in ("confirm", "escalate", "find_orders") and rng.random() < 0.3:
            changes = list(connection.iterdump())
        answer = desk.call(name, arguments)
        assert answer["status"] in ("ok", "proposed", "done", "refused"), answer
        if answer["status"] == "proposed":
            tokens.append(answer["token"])
        if answer["status"] in ("ok", "proposed") and "order_id" in arguments:
            assert owner[arguments["order_id"]] == desk.customer_id
        if answer["status"] == "refused":
            assert answer["policy"] in {article["id"] for article in shop.articles(None)}
        if changes is not None:  # only `confirm` and `escalate` change more than the trail and the proposals
            quiet = ('INSERT INTO "audit"', 'INSERT INTO "proposals"')
            after = [line for line in connection.iterdump() if not line.startswith(quiet)]
            assert after == [line for line in changes if not line.startswith(quiet)]
        done += name == "confirm" and answer["status"] == "done"
    assert done > 3, "the walk did too little to show anything"

    assert not connection.execute("PRAGMA foreign_key_check").fetchall()
    for column in ("case_id", "order_id"):
        sums = connection.execute(f"SELECT sum(amount) FROM credits GROUP BY {column}").fetchall()
        assert all(total <= systems.CREDIT_LIMIT for (total,) in sums)
    for row in connection.execute("SELECT * FROM refunds"):
        order = before[row["order_id"]]
        assert row["amount"] == order["total"]
        assert (row["state"] == "paid") == (row["amount"] <= systems.REFUND_LIMIT)
    resent = {order_id for (order_id,) in connection.execute("SELECT order_id FROM resends")}
    for order_id, order in before.items():
        status = value(connection, "SELECT status FROM orders WHERE order_id = ?", order_id)
        moves = {"processing": {"cancelled"}, "lost": {"refunded", "processing", "cancelled"}}
        assert status == order["status"] or status in moves.get(order["status"], set())
        assert order["status"] != "lost" or status not in ("processing", "cancelled") or order_id in resent
        paid = value(connection, "SELECT count(*) FROM refunds WHERE order_id = ?", order_id)
        assert paid == 1 or status in (order["status"], "processing")
    for row in connection.execute("SELECT * FROM returns"):
        order = before[row["order_id"]]
        club = value(connection, "SELECT club FROM customers WHERE customer_id = ?", order["customer_id"])
        days = (shop.TODAY - date.fromisoformat(order["delivered"])).days
        assert days <= (90 if club == "trail_club" else 45)
    for sku, pieces in connection.execute("SELECT sku, stock FROM products").fetchall():
        held = "SELECT coalesce(sum(quantity), 0) FROM order_items JOIN orders USING (order_id) WHERE sku = ?"
        back = value(
            connection, f"{held} AND status = 'cancelled' AND order_id IN (SELECT order_id FROM refunds)", sku
        )
        out = value(connection, f"{held} AND order_id IN (SELECT order_id FROM resends)", sku)
        assert pieces == stock[sku] + back - out
