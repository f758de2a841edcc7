"""Fernway's data agree with each other, with their own policies, and with what their loaders promise."""

import hashlib
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from datetime import date
from itertools import pairwise

import pytest

from companion import shop

DIGITS = {"ten four five nine": "10459"}  # one customer spells the number out
SLOTS = dict.fromkeys(
    ["order_id", "product", "size", "colour", "email", "date", "postcode", "code", "country"], str
)
SLOTS |= {"amount": float, "quantity": int}


@pytest.fixture(scope="module")
def articles():
    return {article["id"]: article for article in shop.articles(audience=None)}


@pytest.fixture(scope="module")
def tickets():
    return shop.tickets()


@pytest.fixture(scope="module")
def items_of():
    return shop.order_items().groupby("order_id")["sku"].agg(set).to_dict()


@pytest.fixture(scope="module")
def order_of():
    return shop.orders().set_index("order_id").to_dict("index")


def letter(ticket):
    """What a model would be given to read."""
    return ticket.text if not isinstance(ticket.subject, str) else f"{ticket.subject}\n{ticket.text}"


# What is promised


def test_company_is_as_large_as_promised(tickets):
    assert len(shop.products()) >= 40
    assert len(shop.articles(audience=None)) >= 25
    assert len(shop.orders()) == 200
    assert len(shop.customers()) == 80
    assert len(shop.leads()) == 80
    assert len(shop.sales_calls()) == 12
    assert len(shop.dialogues()) == 60
    assert len(tickets) == 600
    assert tickets["intent"].value_counts().to_dict() == dict.fromkeys(shop.INTENTS, 50)


def test_ids_are_unique(tickets, articles):
    frames = [(shop.products(), "sku"), (shop.customers(), "customer_id"), (shop.orders(), "order_id")]
    assert all(frame[key].is_unique for frame, key in [*frames, (tickets, "id")])
    for records in (shop.dialogues(), shop.leads(), shop.sales_calls()):
        assert len({record["id"] for record in records}) == len(records)
    assert len(articles) == len(shop.articles(audience=None))


def test_intents_are_described_in_order():
    assert len(shop.INTENTS) == 12
    assert shop.INTENTS[0] == "order_status" and shop.INTENTS[-1] == "business_order"
    assert tuple(shop.INTENT_DESCRIPTIONS) == shop.INTENTS
    assert len(set(shop.INTENT_DESCRIPTIONS.values())) == 12


def test_import_is_light():
    code = "import sys, companion.shop; print([m for m in ('pandas', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# Catalogue and orders


def test_products_carry_what_a_question_needs():
    frame = shop.products()
    words = frame["description"].str.split().str.len()
    assert words.between(60, 110).all()
    assert (frame["specs"].map(len) >= 4).all()
    assert frame["last_chance"].sum() == 3
    skus = set(frame["sku"])
    for product in frame.itertuples():
        partners = product.goes_with.split()
        assert partners and set(partners) <= skus - {product.sku}, product.sku


def test_items_were_sold_in_sizes_and_colours_that_exist():
    specs = shop.products().set_index("sku")["specs"]
    for item in shop.order_items().itertuples():
        spec = specs[item.sku]
        if item.size.isdigit():
            smallest, largest = map(int, re.search(r"EU (\d+)-(\d+)", spec["sizes"]).groups())
            assert smallest <= int(item.size) <= largest, item
        elif item.size:
            assert item.size in spec["sizes"], item
        if item.colour:
            assert item.colour in spec["colours"], item


def test_orders_refer_to_customers_and_items_to_products(items_of):
    orders = shop.orders()
    assert set(orders["customer_id"]) <= set(shop.customers()["customer_id"])
    assert set(items_of) == set(orders["order_id"])
    assert set.union(*items_of.values()) <= set(shop.products()["sku"])


def test_order_totals_add_up():
    orders, items = shop.orders().set_index("order_id"), shop.order_items()
    goods = (items["quantity"] * items["unit_price"]).groupby(items["order_id"]).sum()
    assert ((goods + orders["shipping_cost"] - orders["total"]).abs() < 0.005).all()


def price_in(article, service):
    """Price and free limit of a delivery service, as its article's table states them."""
    price, free = re.search(rf"\| {service} \| ([\d.]+)(?:, free over ([\d.]+))?", article["text"]).groups()
    return float(price), float(free or "inf")


def test_shipping_costs_follow_the_articles(articles):
    home, abroad = articles["shipping-uk"], articles["shipping-eu"]
    services = {("GB", "standard"): price_in(home, "Standard"), ("GB", "express"): price_in(home, "Express"),
                ("EU", "standard"): price_in(abroad, "Standard")}  # fmt: skip
    assert list(services.values()) == [(3.95, 60), (7.95, float("inf")), (9.95, 150)]
    orders = shop.orders().merge(shop.customers(), on="customer_id")
    for order in orders.itertuples():
        price, free = services["GB" if order.country == "GB" else "EU", order.shipping]
        expected = 0 if order.total - order.shipping_cost > free else price
        assert order.shipping_cost == expected, order.order_id


def test_orders_keep_to_what_the_shop_offers():
    orders = shop.orders().merge(shop.customers(), on="customer_id")
    remote = orders["postcode"].str.match(r"(IV|PH|HS|BT)\d")
    assert not (orders["shipping"].eq("express") & (remote | orders["country"].ne("GB"))).any()
    assert not (orders["payment"].eq("klarna") & orders["country"].ne("GB")).any()
    assert (orders["delivered"].dropna().dt.day_of_week < 5).all()
    posted = set(shop.order_items()["sku"])
    assert "FW-704" not in posted, "gas cannot be posted"


def test_status_and_dates_agree():
    orders = shop.orders()
    waiting = orders["status"].isin(["processing", "packed", "cancelled"])
    assert (orders["shipped"].isna() == waiting).all()
    assert ((orders["tracking"] == "") == waiting).all()
    arrived = orders["status"].isin(["delivered", "returned", "refunded"])
    assert (orders["delivered"].notna() == arrived).all()
    assert (orders["placed"].dt.date <= shop.TODAY).all()


# Articles


def test_articles_have_the_length_of_an_answer(articles):
    for article in articles.values():
        assert 150 <= len(article["text"].split()) <= 350, article["id"]
        assert article["text"].startswith("# ")
        assert date.fromisoformat(article["updated"]) <= shop.TODAY


def test_internal_articles_stay_internal():
    public, internal = shop.articles(), shop.articles("internal")
    assert {article["audience"] for article in public} == {"public"}
    assert {article["id"] for article in internal} == {"compensation", "escalation", "tone-of-voice"}
    assert not any("team lead" in article["text"] for article in public)
    everything = sorted([*public, *internal], key=lambda article: article["id"])
    assert shop.articles(audience=None) == everything


@pytest.mark.parametrize(
    ("pattern", "value", "holders"),
    [
        (r"(\d+) days of delivery", "45", {"returns", "exchanges"}),
        (r"(\d+) days\*\* to return", "90", {"trail-club"}),
        (r"[Mm]embers.{0,25}have (\d+) days|\((\d+) for Trail Club", "90", {"returns", "exchanges"}),
        (r"return(?: the item \(|s? costs? )(\d+\.\d+)", "6.95", {"returns", "shipping-eu", "exchanges"}),
        (r"(\d+) working days of (?:your|the) parcel arriving", "5", {"returns", "refunds", "tone-of-voice"}),
        (r"no scan for (\d+) working days", "5", {"tracking"}),
        (r"(\d+) years on items made by Fernway|made by Fernway:\*\* (\d+) years", "5",
         {"warranty", "damaged-or-wrong"}),
        (r"decision within (\d+) working days", "3", {"warranty", "damaged-or-wrong"}),
        (r"[Pp]atch(?:, sewn or welded \|| is| from the workshop costs) (\d+\.\d+)", "12.00",
         {"repairs", "hire", "care-down"}),
        (r"(?:Re-proofing a jacket \||The workshop does it for) (\d+\.\d+)", "16.00",
         {"repairs", "care-waterproofs"}),
        (r"(?:Boots resoled, the pair \||Pebble for|resole them for) (\d+\.\d+)", "65.00",
         {"repairs", "care-boots", "tone-of-voice"}),
        (r"deposit of (\d+\.\d+)|one sum of (\d+\.\d+)", "100.00", {"hire", "choosing-a-tent"}),
        (r"valid for (\d+) minutes", "60", {"account"}),
        (r"takes up to (\d+) days", "30", {"account", "privacy"}),
        (r"[Kk]ept for (\d+) years, (?:since|because) tax", "6", {"account", "privacy"}),
        (r"up to (\d+\.\d+) store credit", "15.00", {"compensation"}),
        (r"[Rr]efund above (\d+\.\d+)", "150.00", {"compensation", "escalation"}),
        (r"within (\d+) hours of ordering", "24", {"promo-codes"}),
        (r"lasts?(?: as long as a gift card,)? (\d+) months|## How long it lasts\n\n(\d+) months", "24",
         {"gift-cards", "price-promise", "compensation"}),
        (r"lower our own price within (\d+) days", "14", {"price-promise"}),
    ],
)  # fmt: skip
def test_policies_agree_wherever_they_are_stated(articles, pattern, value, holders):
    """Every article that states the policy states this number, and these articles do state it."""
    found = {id: [next(filter(None, match.groups())) for match in re.finditer(pattern, article["text"])]
             for id, article in articles.items()}  # fmt: skip
    stated = {id: numbers for id, numbers in found.items() if numbers}
    assert holders <= set(stated)
    assert {number for numbers in stated.values() for number in numbers} == {value}, stated


def test_group_discounts_are_stated(articles):
    table = re.findall(r"\| (\d+)[^|]*\| (\d+) % \|", articles["business-orders"]["text"])
    assert table == [("10", "8"), ("25", "12"), ("50", "15")]


@pytest.mark.parametrize("id", ["choosing-a-tent", "choosing-a-sleeping-bag"])
def test_buying_advice_quotes_the_catalogue(articles, id):
    catalogue = shop.products().set_index("name")
    rows = re.findall(
        r"^\| ([A-Z][\w -]+\d\w*) \|.*?\| ([\d.]+) kg \| ([\d.]+) \|$", articles[id]["text"], re.M
    )
    assert len(rows) >= 3
    for name, weight, price in rows:
        (product,) = [row for full, row in catalogue.iterrows() if full.startswith(name)]
        assert product["price"] == float(price), name
        assert round(product["weight_g"] / 1000, 1) == round(float(weight), 1), name


# Tickets


def test_tickets_use_legal_labels(tickets):
    legal = {
        "channel": {"email", "chat", "web_form", "social"},
        "language": {"en"},
        "intent": set(shop.INTENTS),
        "urgency": {"low", "normal", "high"},
        "sentiment": {"positive", "neutral", "frustrated", "angry"},
    }
    for column, values in legal.items():
        assert set(tickets[column]) == values
    assert set(tickets["second_intent"].dropna()) <= set(shop.INTENTS)
    assert not (tickets["second_intent"] == tickets["intent"]).any()
    assert (tickets["subject"].notna() == tickets["channel"].isin(["email", "web_form"])).all()
    assert (tickets.loc[tickets["safety"], "urgency"] == "high").all()


def test_slots_are_typed_and_known(tickets):
    skus = set(shop.products()["sku"])
    for ticket in tickets.itertuples():
        for key, value in ticket.slots.items():
            assert isinstance(value, SLOTS[key]), (ticket.id, key)
        assert ticket.slots.get("product", "FW-101") in skus
        assert re.fullmatch(r"FW-\d{5}", ticket.slots.get("order_id", "FW-10000"))
        assert re.fullmatch(r"[A-Z]{2}", ticket.slots.get("country", "GB")), ticket.id
        date.fromisoformat(ticket.slots.get("date", "2026-11-20"))


def test_slots_hold_only_what_the_text_says(tickets):
    for ticket in tickets.itertuples():
        said = letter(ticket).lower()
        for words, digits in DIGITS.items():
            said = said.replace(words, digits)
        said = said.replace(" ", "")
        for key in ("email", "postcode", "code"):
            assert ticket.slots.get(key, "").lower().replace(" ", "") in said, (ticket.id, key)
        assert ticket.slots.get("order_id", "")[3:] in said, ticket.id
        assert ticket.slots.get("colour", "") in said, ticket.id


def test_tickets_agree_with_the_order_they_speak_of(tickets, order_of, items_of):
    customers = set(shop.customers()["customer_id"])
    assert set(tickets["customer_id"].dropna()) <= customers
    spoken = 0
    for ticket in tickets.itertuples():
        order_id = ticket.slots.get("order_id")
        order = order_of.get(order_id)
        if order is None:  # mistyped, which only an unknown writer may do
            assert order_id is None or ticket.customer_id not in customers, ticket.id
            continue
        spoken += 1
        assert ticket.customer_id not in customers or order["customer_id"] == ticket.customer_id, ticket.id
        assert ticket.created.date() >= order["placed"].date(), ticket.id
        assert ticket.slots.get("product") in items_of[order_id] | {None}, ticket.id
    assert spoken > 200


def test_tickets_were_written_this_autumn(tickets):
    days = tickets["created"].dt.date
    assert days.min() >= date(2026, 8, 3) and days.max() <= shop.TODAY


def test_no_two_tickets_read_alike(tickets):
    plain = tickets["text"].str.lower().str.replace(r"\W+", " ", regex=True).str.strip()
    assert plain.is_unique
    openings = Counter(
        (intent, *text.split()[:4]) for intent, text in zip(tickets["intent"], plain, strict=True)
    )
    assert max(openings.values()) <= 2, openings.most_common(3)


def test_people_write_at_very_different_lengths(tickets):
    length = tickets["text"].str.len()
    assert length.min() < 20 and length.max() > 800
    assert 120 < length.median() < 300
    assert 0.1 < tickets["second_intent"].notna().mean() < 0.2


# The split


def test_split_is_stratified(tickets):
    counts = tickets.groupby(["split", "intent"]).size().unstack("split")
    assert (counts == {"train": 35, "validation": 6, "test": 9}).all().all()
    assert tickets.groupby("split")["safety"].sum().min() >= 2


def test_split_is_the_published_one(tickets):
    mapping = "\n".join(f"{ticket.id} {ticket.split}" for ticket in tickets.itertuples())
    assert hashlib.sha256(mapping.encode()).hexdigest() == (
        "bee2df7cfb4a61f027bb6f0ca70cee3107eb3172cfd377a1960071a465d1865d"
    )


def test_no_ticket_has_a_near_twin_on_another_side(tickets):
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(3, 5)).fit_transform(
        map(letter, tickets.itertuples())
    )
    split = tickets["split"].to_numpy()
    likeness = (vectors @ vectors.T).toarray() * (split[:, None] != split[None, :])
    one, other = divmod(likeness.argmax(), len(tickets))
    pair = f"{tickets['id'][one]} and {tickets['id'][other]} are {likeness.max():.3f} alike"
    assert likeness.max() < 0.25, pair


def test_split_argument_selects(tickets):
    sizes = {split: len(shop.tickets(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 420, "validation": 72, "test": 108}
    assert set(shop.tickets("test")["split"]) == {"test"}


# Conversations and leads


def test_dialogues_alternate_and_keep_the_voice():
    for dialogue in shop.dialogues():
        roles = [message["role"] for message in dialogue["messages"]]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))], dialogue["id"]
        assert len(roles) >= 3
        for message in dialogue["messages"]:
            if message["role"] == "assistant":
                assert "!" not in message["content"], dialogue["id"]


def test_dialogues_rest_on_articles_and_orders(articles, order_of):
    customers = set(shop.customers()["customer_id"])
    for dialogue in shop.dialogues():
        assert dialogue["kind"] in ("service", "sales")
        assert dialogue["intent"] in shop.INTENTS
        assert dialogue["policies"] and set(dialogue["policies"]) <= set(articles), dialogue["id"]
        assert dialogue["customer_id"] in customers | {None}
        if dialogue["order_id"]:
            order = order_of[dialogue["order_id"]]
            assert order["customer_id"] == dialogue["customer_id"], dialogue["id"]
            assert order["placed"].date() <= date.fromisoformat(dialogue["date"]), dialogue["id"]


def test_leads_are_complete_and_judged():
    products = shop.products()
    needs = set(products["sku"]) | set(products["category"])
    leads = shop.leads()
    for lead in leads:
        assert 20 <= len(lead["message"].split()) <= 120, lead["id"]
        assert set(lead["need"]) <= needs, lead["id"]
        assert lead["source"] in ("web_form", "phone", "trade_fair", "referral", "email")
        assert lead["stage"] in ("new", "qualified", "quoted", "won", "lost")
        assert lead["deadline"] is None or lead["deadline"] > lead["created"], lead["id"]
        assert lead["next_step"].endswith(".")
        if lead["label"] == "hot":
            assert lead["need"] and lead["decision_maker"], lead["id"]
            assert lead["deadline"] or lead["budget"], lead["id"]
        if lead["label"] == "not_a_lead":
            assert lead["stage"] == "lost", lead["id"]
    labels = Counter(lead["label"] for lead in leads)
    assert set(labels) == {"hot", "warm", "cold", "not_a_lead"} and min(labels.values()) >= 10
    assert len({lead["message"].split(".")[0] for lead in leads}) == len(leads)


def test_sums_of_leads_stand_in_their_messages():
    """A budget written in figures is the budget of the record."""
    checked = 0
    for lead in shop.leads():
        written = re.findall(r"£[\d,]*\d|\b\d,\d{3}\b", lead["message"])
        figures = {int(figure.strip("£").replace(",", "")) for figure in written}
        if figures and lead["budget"]:
            checked += 1
            assert lead["budget"] in figures, lead["id"]
    assert checked >= 10


def test_sales_calls_are_conversations_with_a_note():
    skus = set(shop.products()["sku"])
    for call in shop.sales_calls():
        speakers = [turn["speaker"] for turn in call["turns"]]
        assert 8 <= len(speakers) <= 16 and set(speakers) == {"rep", "customer"}
        assert all(one != other for one, other in pairwise(speakers)), call["id"]
        assert set(call["crm"]) == {"need", "quantity", "budget", "deadline", "objections", "next_step"}
        assert set(call["crm"]["need"]) <= skus


def test_no_address_could_reach_anybody(tickets):
    texts = [*tickets["text"], *shop.customers()["email"]]
    texts += [message["content"] for dialogue in shop.dialogues() for message in dialogue["messages"]]
    texts += [article["text"] for article in shop.articles(audience=None)]
    texts += [lead["message"] for lead in shop.leads()]
    addresses = [address for text in texts for address in re.findall(r"[\w.+-]+@([\w-]+(?:\.[\w-]+)+)", text)]
    assert len(addresses) >= 80
    assert {address.rstrip(".").rsplit(".", 1)[1] for address in addresses} == {"example"}


# Loaders


def test_frames_have_dates_numbers_and_texts():
    orders, customers = shop.orders(), shop.customers()
    for column in (orders["placed"], orders["shipped"], orders["delivered"], customers["since"]):
        assert column.dtype.kind == "M"
    assert orders["total"].dtype == float and shop.order_items()["quantity"].dtype == int
    assert isinstance(customers["postcode"].iloc[10], str) and "8000" in set(customers["postcode"])
    assert shop.products()["last_chance"].dtype == bool
    assert isinstance(shop.products()["specs"][0], dict)
    assert shop.tickets()["created"].dtype.kind == "M"


def test_what_is_returned_is_the_callers_own():
    shop.leads()[0]["label"] = "spoilt"
    shop.tickets()["slots"][0]["order_id"] = "spoilt"
    assert shop.leads()[0]["label"] != "spoilt"
    assert shop.tickets()["slots"][0]["order_id"] != "spoilt"


@pytest.mark.parametrize(
    ("load", "value", "legal"),
    [
        (shop.tickets, "dev", ["train", "validation", "test"]),
        (shop.articles, "secret", ["public", "internal"]),
    ],
)
def test_wrong_argument_is_named_with_the_right_ones(load, value, legal):
    with pytest.raises(ValueError) as error:
        load(value)
    assert all(repr(word) in str(error.value) for word in [value, *legal])


# Database


def test_database_holds_the_same_rows_as_the_frames():
    connection = shop.database()
    for load in (shop.products, shop.customers, shop.orders, shop.order_items):
        rows = connection.execute(f"SELECT * FROM {load.__name__}").fetchall()
        assert len(rows) == len(load())
        assert rows[0].keys() == list(load().columns)
    (total,) = connection.execute("SELECT sum(total) FROM orders").fetchone()
    assert total == pytest.approx(shop.orders()["total"].sum())
    row = connection.execute("SELECT * FROM orders WHERE status = 'processing' LIMIT 1").fetchone()
    assert row["tracking"] is None and row["shipped"] is None


def test_database_is_fresh_at_each_call():
    first = shop.database()
    first.execute("UPDATE products SET stock = 0")
    first.commit()
    (stock,) = shop.database().execute("SELECT sum(stock) FROM products").fetchone()
    assert stock == shop.products()["stock"].sum() > 0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE orders SET customer_id = 'C999' WHERE order_id = 'FW-10181'",
        "INSERT INTO order_items VALUES ('FW-10181', 'FW-999', 1, NULL, NULL, 10.0)",
        "DELETE FROM customers WHERE customer_id = 'C022'",
        "UPDATE products SET stock = -1 WHERE sku = 'FW-101'",
        "UPDATE orders SET status = 'teleported' WHERE order_id = 'FW-10181'",
        "UPDATE orders SET delivered = '2026-05-01' WHERE order_id = 'FW-10181'",
    ],
)
def test_database_refuses_what_cannot_be(statement):
    with pytest.raises(sqlite3.IntegrityError):
        shop.database().execute(statement)


def test_database_goes_to_a_new_file_and_never_over_an_old_one(tmp_path):
    path = tmp_path / "fernway.db"
    shop.database(path).close()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM orders").fetchone() == (200,)
    with pytest.raises(FileExistsError, match=r"fernway\.db exists already"):
        shop.database(path)
