"""Fernway's assistant for orders: a conversation whose course is held by code.

    assistant = Assistant(Desk(shop.database()))
    assistant.reply("Please cancel FW-10768, my postcode is NR2 3TT")     "Cancel order FW-10768 … Shall I?"
    assistant.reply("yes please")                                         "Done. …"
    assistant.wish, assistant.slots, assistant.state                      what it has understood so far

The division of labour: an embedding model says which of `EXAMPLES` a message is most like, which is the
customer's wish. Patterns read facts (`read_facts`) and signs of an emergency (`urgent_sign`). Code decides
what is asked next, and calls the desk (`companion.shop.systems`), which holds the policies. Sentences are
written by people, in `_say…`; `phrase` may reword them, and what it returns is used only if `same_facts`
holds.

`state` is "listening", "asking" (for a fact), "confirming" (a proposal has been read out) or "handed over".
A proposal is confirmed by `says_yes` alone, which takes a plain yes and nothing else. The second message that
it does not understand goes to a person. It does not talk about anything but orders and the public articles,
holds one wish at a time, and reads English only.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from companion import backend
from companion.retrieval import Index
from companion.shop.systems import POSTCODES, Desk

# What customers ask for, as they might. A message's wish is that of its most similar example.
EXAMPLES = {
    "parcel": [
        "Where is my parcel?",
        "Tracking has not moved for days. When will my order arrive?",
        "My order never came, I think it is lost.",
        "What is the status of my order?",
    ],
    "cancel": [
        "Please cancel my order.",
        "I don't want it any more, stop the order before it is sent.",
        "Ordered by mistake, can you cancel the whole thing?",
    ],
    "address": [
        "I need to change the delivery address of my order.",
        "Please send it to another address, I typed the wrong street.",
        "We have moved, can the parcel go to our new home?",
    ],
    "size": [
        "Can you change the size of an item in my order?",
        "I ordered the wrong size, please make it an M.",
        "Wrong colour chosen, please switch it before you pack it.",
    ],
    "return": [
        "I want to send an item back.",
        "I want to return the jacket.",
        "It is too small and I don't like it, can it go back?",
        "It doesn't fit, how do I return it? I need a return label.",
        "Can I give this back and get my money?",
    ],
    "refund": [
        "Where is my refund?",
        "I want my money back for the parcel that got lost.",
        "Refund the order that never arrived.",
    ],
    "credit": [
        "I want compensation for the trouble.",
        "You should give me a voucher for this long wait.",
        "What will you pay me for this mess?",
    ],
    "question": [
        "How long do I have to return something?",
        "What does delivery cost and how long does it take?",
        "How do I wash a down jacket?",
        "Which payment methods do you take?",
        "How long is the warranty?",
    ],
    "person": [
        "I want to talk to a human.",
        "Let me speak to your manager.",
        "Put me through to a real person.",
    ],
    "thanks": ["Thank you, that's all.", "Thanks, bye.", "Great, that helps."],
}
UNSURE = 0.35  # a message less similar than this to every example has no wish

SURE = 0.6  # while a proposal is open, only a message as similar as this is a new wish

# Signs of article "escalation". A miss costs more than a false alarm.
_SIGNS = {
    "danger": r"burn(?:t|ed|s|ing)?\b|flame|flare|on fire|explo|swollen|bulg|injur|bleed|blood|hospital"
    r"|stitches|scald|smoke|leaking gas|electric shock|too hot to touch|so hot",
    "legal": r"solicitor|lawyer|small claims|court\b|trading standards|legal action|legal proceedings",
    "press": r"journalist|newspaper|reporter|press office|i write for",
    "vulnerable": r"suicid|kill myself|can't go on|cannot go on|being forced|child is alone",
    "fraud": r"\bhacked|someone (?:else )?(?:has )?(?:used|got into|ordered)"
    r"|orders? i (?:did not|didn't|never) (?:place|make)",
    "data_protection": r"data request|gdpr|copy of (?:all )?my data|delete (?:all )?my data|data protection",
}
_POSTCODE = rf"\b(?:{POSTCODES['GB']}|{POSTCODES['IE']})\b" + "".join(
    rf"|(?<={said} )(?:{POSTCODES['SE']}\b|\d{{4,5}})" for said in ("postcode", "postcode is")
)
_STREET = (
    r"(\d+[a-z]? [\w' ]+? (?:street|road|rise|lane|avenue|close|way|hill|drive|st|rd))"
    r"[, ]+(?:in )?([A-Z][\w-]+)"
)
_YES = r"(?:yes|yep|yeah|ok|okay|sure|please do|go ahead|do it|correct|that's right|confirm(?:ed)?)"
_POLITE = (
    r"(?:please|thanks|thank you|do|do it|do that|go ahead|cancel it|that's right|that is right|fine|it)"
)
_NO = r"\b(?:no|nope|don't|dont|do not|stop|wait|never mind|keep|leave it|changed my mind|forget it)\b"
_DOUBT = rf"{_NO}|\?|\b(?:but|if|instead|actually|only|and then|first|unless|except)\b"


def urgent_sign(text: str) -> str | None:
    """The first sign in `companion.shop.systems.URGENT` whose words stand in the text, or None."""
    low = text.lower()
    return next((sign for sign, pattern in _SIGNS.items() if re.search(pattern, low)), None)


def read_facts(text: str) -> dict[str, str]:
    """What stands in the text: order_id, email, postcode, size, street and city, unused and settle."""
    found = {}
    # A postcode may look like the number of an order; a number after "FW" does not look like a postcode.
    without = re.sub(_POSTCODE, " ", text, flags=re.IGNORECASE)
    if match := re.search(r"(?<![\d.])(?:FW)?[- ]?(1\d{4})(?!\d)", without, re.IGNORECASE):
        found["order_id"] = f"FW-{match[1]}"
    for name, pattern in (
        ("email", r"([\w.+-]+@[\w-]+\.[\w.-]*\w)"),
        ("postcode", f"({_POSTCODE})"),
        ("size", r"\b(?:size |an? |to |in |make it )(XXL|XL|XS|S|M|L|3[6-9]|4[0-8]|\d-\dy)\b"),
    ):
        if match := re.search(pattern, text, re.IGNORECASE):
            found[name] = match[1].upper() if name in ("postcode", "size") else match[1]
    if match := re.search(_STREET, text, re.IGNORECASE):
        found["street"], found["city"] = match[1], match[2]
    low = text.lower()
    if re.search(r"\bunused|unworn|never (?:used|worn)|tags (?:are )?(?:still )?on|as new", low):
        found["unused"] = "yes"
    elif re.search(r"\b(?:have|been) (?:used|worn)|wore (?:it|them)|used (?:it|them)", low):
        found["unused"] = "no"
    again = re.search(r"again|resend|new one|replacement|another one", low)
    money = re.search(r"refund|money back", low)
    if bool(again) != bool(money):
        found["settle"] = "resend" if again else "refund"
    return found


def says_yes(text: str) -> bool:
    """Whether it begins with a plain yes and takes nothing back. "Yes, but …" and "yes?" are none."""
    low = re.sub(r"^\s*(?:hello|hi|hi there|good \w+)[.,!]\s*", "", text.lower().replace("’", "'"))
    first = " ".join(re.sub(r"[,!]", " ", re.split(r"[.?\n]", low)[0]).split())
    plain = re.fullmatch(rf"{_YES}(?: (?:{_YES}|{_POLITE}))*", first) is not None
    return plain and re.search(_DOUBT, low) is None


def says_no(text: str) -> bool:
    """Whether a no stands in it, and it does not begin with a yes, which would be neither."""
    low = text.lower().replace("’", "'")
    begins = re.match(rf"\s*(?:(?:hm+|well|hello|hi)[,. ]+)*{_YES}\b", low)
    return re.search(_NO, low) is not None and not begins


def same_facts(text: str, reworded: str) -> bool:
    """Whether `reworded` has all numbers of `text`, no others, and is not far longer."""

    def facts(one):
        return set(re.findall(r"FW-\d+|\d+(?:[.,:]\d+)*", one))

    return facts(text) == facts(reworded) and 0 < len(reworded) < 2 * len(text) + 40


def _without_facts(text):
    """The text without numbers, addresses and their labels, which say who and which, and not what for."""
    text = re.sub(rf"{_POSTCODE}|[\w.+-]+@[\w.-]+|(?:FW)?-?\b\d{{5}}\b", "", text, flags=re.IGNORECASE)
    return re.sub(r"(?i)\b(?:my postcode is|the order is|i ordered with)", "", text).strip(" .,")


class Understanding:
    """Which wish of `examples` a message is: that of its most similar example, by the cosine of embeddings.

    examples: for each wish, messages that say it.
    client: an `openai.OpenAI`; the backend's if None.
    """

    def __init__(self, examples=EXAMPLES, client=None):
        self.client = client
        self.wishes = [wish for wish, texts in examples.items() for _ in texts]
        self.vectors = self._embed([text for texts in examples.values() for text in texts])

    def __call__(self, text: str) -> tuple[str, float]:
        """The wish and the similarity of its example, at most 1."""
        (vector,) = self._embed([text[:600] or "."])
        scores = [sum(a * b for a, b in zip(vector, other, strict=True)) for other in self.vectors]
        best = max(range(len(scores)), key=scores.__getitem__)
        return self.wishes[best], scores[best]

    def _embed(self, texts):
        client = self.client or backend.client()
        reply = client.embeddings.create(model=backend.embedding_model(), input=texts)
        return [item.embedding for item in reply.data]


class Assistant:
    """One conversation with a customer.

    desk: the order systems; the conversation is the desk's case.
    understand: a function from a message to (wish, similarity); an `Understanding` if None. Share one, since
        making it embeds the examples.
    index: what questions are answered from; without it they go to a person.
    phrase: a function that rewords a sentence, such as a call to a chat model; None says it as written.
    """

    def __init__(
        self,
        desk: Desk,
        understand: Callable[[str], tuple[str, float]] | None = None,
        index: Index | None = None,
        phrase: Callable[[str], str] | None = None,
    ):
        self.desk, self.index, self.phrase = desk, index, phrase
        self.understand = understand or Understanding()
        self.state, self.wish, self.token = "listening", None, None
        self.slots: dict[str, str] = {}
        self.transcript: list[dict[str, str]] = []
        self._orders: list[str] = []
        self._missed = 0  # messages that were not understood

    def reply(self, text: str) -> str:
        """The answer to the customer's next message."""
        text = text.encode("utf-8", "replace").decode()  # half a character would stop the database
        self.transcript.append({"role": "user", "content": text})
        answer = self._turn(text)
        if self.phrase and self.state == "listening":  # what is asked or proposed is never reworded
            reworded = self.phrase(answer)
            answer = reworded if same_facts(answer, reworded) else answer
        self.transcript.append({"role": "assistant", "content": answer})
        return answer

    # One turn: an emergency, then an open proposal, then the wish

    def _turn(self, text):
        if self.state == "handed over":
            return "A person has your case now and will write to you. I can't do anything more here."
        if sign := urgent_sign(text):
            return self._hand_over(sign, text)
        if self.state == "confirming":
            if says_yes(text):
                return self._done(self.desk.confirm(token=self.token))
            if says_no(text):
                self._forget()
                return "Then nothing is changed. Is there anything else?"
        self._read(text)
        wish, similarity = self.understand(_without_facts(text))
        asked = self.state == "asking" and bool(read_facts(text))  # an answer to our question, no new wish
        sure = SURE if self.state == "confirming" else UNSURE
        if similarity >= sure and not asked and not (self.wish and wish in ("question", "thanks")):
            if wish != self.wish:
                self.state, self.token = "listening", None
            self.wish = wish
        if self.state == "confirming":
            return "I need a plain yes or no before I do that. Shall I?"
        if self.wish is None:
            self._missed += 1  # asking a second time would help nobody
            return _OFFER if self._missed % 2 else self._hand_over("other", text)
        return getattr(self, f"_{self.wish}")(text)

    def _read(self, text):
        """Keep the facts of a message. A postcode beside a street is where the parcel should go."""
        facts = read_facts(text)
        if "street" in facts and "postcode" in facts:
            codes = re.findall(_POSTCODE, text, re.IGNORECASE)
            self.slots["new_postcode"] = codes[-1].upper()
            facts["postcode"] = codes[0].upper()
            if len(codes) == 1:
                del facts["postcode"]
        self.slots |= facts

    # What is needed before anything else: who is it, and which order?

    def _identify(self):
        """None once the customer and the order are known, otherwise what to say."""
        known = {key: self.slots[key] for key in ("order_id", "email", "postcode") if key in self.slots}
        if self.desk.customer_id is None:
            if len(known) < 2:
                self.state = "asking"
                missing = "postcode or email address" if "order_id" in known else "order number and postcode"
                return f"To find it I need your {missing}."
            answer = self.desk.call("find_orders", known)
            if answer["status"] != "ok":
                self._refused(answer)
                self.slots, self.state = {}, "asking"
                return answer["reason"] if answer["status"] == "refused" else _UNREAD
            self._orders = [order["order_id"] for order in answer["orders"]]
        if "order_id" not in self.slots:
            if len(self._orders) != 1:
                which = f": {', '.join(self._orders[:5])}" if self._orders else ""
                return self._ask(f"Which order do you mean{which}? I need the order number.")
            self.slots["order_id"] = self._orders[0]
        return None

    def _order(self):
        answer = self.desk.order_status(order_id=self.slots["order_id"])
        return answer if answer["status"] == "ok" else None

    def _item(self, text, order):
        """The item that the customer names, or the only one there is."""
        if len(order["items"]) == 1:
            return order["items"][0]["sku"]
        said = " ".join(one["content"] for one in self.transcript if one["role"] == "user").lower()
        for where in (text.lower(), said):
            for item in order["items"]:
                words = [word for word in re.findall(r"[a-z]{4,}", item["name"].lower())]
                if any(re.search(rf"\b{word[:-1]}", where) for word in words):
                    return item["sku"]
        return None

    def _ask(self, question):
        self.state = "asking"
        return question

    # Wishes

    def _parcel(self, text):
        if question := self._identify():
            return question
        found = self._order()
        if found is None:
            return self._refused(self.desk.order_status(order_id=self.slots["order_id"]))
        if found["order"]["status"] == "lost" and not found["refunds"]:
            return self._refund(text)
        answer = _say_status(found)
        self._forget()
        return answer

    def _refund(self, text):
        if question := self._identify():
            return question
        found = self._order()
        if found is None or found["order"]["status"] != "lost" or found["refunds"]:
            return (
                self._parcel(text)
                if found
                else self._refused(self.desk.order_status(order_id=self.slots["order_id"]))
            )
        if "settle" not in self.slots:
            return self._ask(
                f"{self.slots['order_id']} counts as lost, and that is ours to put right."
                " Should we send it again, or do you want a refund?"
            )
        return self._propose("settle_lost_order", wish=self.slots["settle"])

    def _cancel(self, text):
        return self._identify() or self._propose("cancel_order")

    def _address(self, text):
        if question := self._identify():
            return question
        if not {"street", "city", "new_postcode"} <= set(self.slots):
            return self._ask("What is the new address, with house number, street, city and postcode?")
        return self._propose(
            "change_address",
            street=self.slots["street"],
            city=self.slots["city"],
            postcode=self.slots["new_postcode"],
        )

    def _size(self, text):
        if question := self._identify():
            return question
        found = self._order()
        sku = found and self._item(text, found)
        if found and not sku:
            return self._ask("Which item of the order is it?")
        if found and "size" not in self.slots:
            return self._ask("Which size do you need?")
        return self._propose("change_item", sku=sku or "?", size=self.slots.get("size", "?"))

    def _return(self, text):
        if question := self._identify():
            return question
        found = self._order()
        sku = found and self._item(text, found)
        if found and not sku:
            return self._ask("Which item of the order do you want to return?")
        if found and "unused" not in self.slots:
            return self._ask("Is it unused, with its tags on?")
        return self._propose("start_return", sku=sku or "?", unused=self.slots.get("unused") == "yes")

    def _credit(self, text):
        return self._hand_over("approval", text)

    def _person(self, text):
        return self._hand_over("other", text)

    def _thanks(self, text):
        self._forget()
        return "You're welcome."

    def _question(self, text):
        hits = self.index.search(text, k=1) if self.index else []
        if not hits:
            return self._hand_over("other", text)
        self._forget()
        return f'{_quote(hits[0].text)} (from our page "{hits[0].title}")'

    # Proposing, doing, refusing, handing over

    def _propose(self, tool, **arguments):
        answer = self.desk.call(tool, {"order_id": self.slots["order_id"], **arguments})
        if answer["status"] != "proposed":
            return self._refused(answer)
        self.state, self.token = "confirming", answer["token"]
        return f"{answer['summary']} Shall I do that? Please answer yes or no."

    def _done(self, answer):
        if answer["status"] != "done":
            return self._refused(answer)
        self._forget()
        return f"Done. {_say_done(answer)}"

    def _refused(self, answer):
        self._forget()
        if answer["status"] == "invalid":
            return _UNREAD
        return f"{answer['reason']} {_INSTEAD.get(answer.get('policy'), '')}".strip()

    def _hand_over(self, sign, text):
        order_id = self.slots.get("order_id") or read_facts(text).get("order_id")
        answer = self.desk.escalate(sign=sign, summary=text[:900] or "?", order_id=order_id)
        self._forget()
        if sign in _SIGNS:
            self.state = "handed over"
        return _say_handover(sign, answer)

    def _forget(self):
        """The wish is dealt with; who the customer is, and which order it was, stay."""
        self.state, self.wish, self.token = "listening", None, None
        self.slots = {
            key: value for key, value in self.slots.items() if key in ("order_id", "email", "postcode")
        }


_OFFER = "I can look up a parcel, change, cancel or return an order, or answer a question. What do you need?"
_UNREAD = "I could not read that. Please write it once more, in fewer words."
_INSTEAD = {
    "order-changes": "You can refuse the delivery, or return it within 45 days.",
    "returns": "If you think that is wrong, I can ask a colleague to look at it.",
}


def _say_handover(sign, answer):
    hello = (
        "Are you all right? Please stop using it and keep it as it is." if sign == "danger" else "Thank you."
    )
    when = "by tomorrow at 17:00" if sign == "approval" else f"within {answer['within']}"
    when = "today" if sign == "data_protection" else when
    return f"{hello} A person will take over ({answer['goes_to']}) and write to you {when}."


def _say_status(found):
    order = found["order"]
    name, status = order["order_id"], order["status"]
    if found["refunds"]:
        refund = found["refunds"][0]
        paid = "has been paid" if refund["state"] == "paid" else "waits for a second person's signature"
        return f"{name} is {status}. The refund of {refund['amount']:.2f} pounds {paid}."
    if status in ("processing", "packed"):
        return f"{name} is {status}. It has no tracking number before it leaves."
    if status in ("shipped", "delayed"):
        carrier = f"{order['carrier']} has had it since {order['shipped']}"
        return f"{name} is {status}. {carrier}; its number is {order['tracking']}."
    if status == "delivered":
        return f"{name} was delivered on {order['delivered']}, says {order['carrier']}."
    if status == "returned":
        return f"{name} came back to us. We refund within 5 working days of its arriving."
    return f"{name} is {status}."


def _say_done(answer):
    if answer.get("state") == "waits for a signature":
        return f"The refund of {answer['refund']:.2f} pounds now waits for a second person's signature."
    if "refund" in answer:
        return (
            f"{answer['refund']:.2f} pounds go back the way you paid. The bank may need 3 to 5 working days."
        )
    if answer["tool"] == "start_return":
        return "The label comes by email. We refund within 5 working days of the parcel arriving."
    return answer["summary"]


def _quote(text):
    """The first sentences of a chunk, without its headings and tables."""
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "|"))]
    return " ".join(re.split(r"(?<=[.?]) ", " ".join(lines))[:3])
