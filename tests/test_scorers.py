import json
import math
import pickle
import random

import pytest
from scripted import MODEL, Client
from sklearn.metrics import cohen_kappa_score

from companion.evaluation import Answer, Sample, Score
from companion.scorers import (
    LONGEST,
    Preference,
    agreement,
    exact,
    faithful,
    fields,
    includes,
    label,
    matches,
    model_graded,
    number,
    position_bias,
    prefer,
    schema,
    similar,
    tool_call,
)

PRICE = {"type": "object", "properties": {"price": {"type": "number"}}, "required": ["price"]}
PASSAGES = [
    "Unused items may be returned within 30 days. Refunds take five working days.",
    "We ship to the UK.",
]


def score(scorer, text, target=None, **metadata):
    return scorer(Answer(text), Sample("Where is my parcel?", target, metadata=metadata))


def value(scorer, text, target=None, **metadata):
    return score(scorer, text, target, **metadata).value


def verdict(choice):
    return json.dumps({"verdict": choice})


def scorers(client):
    """One of each, with a target that it can use."""
    use = {"model": MODEL, "client": client}
    return [
        (exact(), "yes"),
        (includes(), "yes"),
        (matches("yes"), "yes"),
        (number(), 5),
        (label(["yes", "no"]), "yes"),
        (schema(PRICE), None),
        (fields(), {"price": 5}),
        (tool_call(), {"name": "look_up", "arguments": {}}),
        (similar(**use), "yes"),
        (similar(0.5, **use), "yes"),
        (faithful(PASSAGES, **use), None),
        (model_graded("Is it polite?", **use), None),
    ]


# Whatever comes, a scorer scores or says why not

ODD = {
    "None": None,
    "empty": "",
    "blank": " \n\t",
    "not JSON": '{"price": ',
    "other JSON": "[1, NaN]",
    "deep JSON": '{"price":' * 100_000,
    "deep, closed": "[" * 5_000 + "]" * 5_000,
    "half a character": "\ud800 no",
    "a number beyond floats": "9" * 5_000 + "e999",
    # Twice as long as what `evaluate` hands on, and long enough for a scorer that is not linear to hang.
    "2 MB of words": "of course " * 200_000,
    "2 MB of digits": "12 " * 700_000,
    "2 MB in one word": "a" * 2_000_000,
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_an_odd_answer_is_wrong_or_not_scored_and_says_why_in_a_few_words(text):
    for scorer, target in scorers(Client(verdict("no"))):
        given = score(scorer, text, target)
        assert isinstance(given, Score)
        if "cosine" not in str(given.explanation) and scorer.__name__ != "faithful":
            assert given.value in (0, None), scorer.__name__
        if scorer.__name__ != "model_graded":  # whose explanation is a transcript
            assert given.explanation and len(given.explanation) < 2_000, scorer.__name__
        json.dumps(vars(given), allow_nan=False)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_an_empty_answer_is_wrong_except_where_nothing_is_claimed(text):
    given = {s.__name__: score(s, text, target) for s, target in scorers(Client(verdict("no")))}
    assert given.pop("faithful").value is None
    assert {name: one.value for name, one in given.items()} == dict.fromkeys(given, 0.0)


@pytest.mark.parametrize("target", [None, math.nan, object(), {"a": object()}, [], [None], {1, 2.5}, True])
def test_a_missing_or_odd_target_never_raises(target):
    for scorer, _ in scorers(Client(verdict("yes"), verdict("yes"))):
        assert isinstance(score(scorer, "yes, 5", target), Score)


@pytest.mark.parametrize("target", [None, math.nan])
def test_without_a_target_what_needs_one_is_not_scored(target):
    needing = [exact(), includes(), number(), label(["yes", "no"]), fields(), tool_call(), similar()]
    for scorer in needing:
        assert score(scorer, "yes", target) == Score(None, explanation="the sample has no target")


def test_where_the_solver_failed_nothing_is_scored():
    for scorer, target in scorers(Client()):
        given = scorer(Answer(None, error="timed out"), Sample("Hello", target))
        assert given == Score(None, explanation="there is no answer: timed out")


def test_where_no_model_answers_what_needs_one_is_not_scored():
    class Gone:
        def __getattr__(self, name):
            raise ConnectionError("the endpoint went away")

    use = {"client": Gone(), "model": MODEL}
    for scorer in (similar(**use), faithful(PASSAGES, **use), model_graded("Is it polite?", **use)):
        given = score(scorer, "yes", "yes")
        assert given.value is None
        assert given.explanation == "could not be scored: ConnectionError: the endpoint went away"


def test_a_scorer_is_known_by_its_name_or_the_one_given():
    assert [scorer.__name__ for scorer, _ in scorers(Client())][:6] == [
        "exact",
        "includes",
        "matches",
        "number",
        "label",
        "schema",
    ]
    assert model_graded("Is it polite?", name="polite").__name__ == "polite"


# Text


def test_exact_ignores_case_and_spaces_and_nothing_else():
    assert value(exact(), "  Order\n Status ", "order status") == 1
    assert value(exact(), "STRASSE", "straße") == 1
    assert value(exact(), "cafe\u0301", "caf\u00e9") == 1
    assert score(exact(), "Order status.", "order status") == Score(
        0.0, explanation="said 'Order status.' instead of 'order status'"
    )
    assert value(exact(case=True), "Order", "order") == 0
    assert value(exact(case=True), " Order ", "Order") == 1


def test_exact_takes_several_targets_and_numbers_and_nothing_as_an_answer():
    assert value(exact(), "B", ["a", "b"]) == 1
    assert value(exact(), "17", 17) == 1
    assert value(exact(), " ", "") == 1
    assert value(exact(), "c", ["a", "b"]) == 0
    assert value(exact(), "true", True) is None
    assert value(exact(), "a", {"a": 1}) is None


def test_includes_finds_whole_words():
    assert score(includes(), "Order FW-104 has left.", "fw-104") == Score(1.0, "fw-104")
    assert value(includes(), "Order FW-1045 has left.", "FW-104") == 0
    assert value(includes(), "It is\n on its  WAY", "on its way") == 1
    assert value(includes(case=True), "on its WAY", "way") == 0
    assert value(includes(), "It costs (£5).", "£5") == 1
    assert value(includes(), "by post", ["courier", "post"]) == 1
    assert value(includes(), "a.c", "a.c") == 1 and value(includes(), "abc", "a.c") == 0
    assert score(includes(), "anything", "").value is None


def test_matches_gives_what_was_found():
    assert score(matches(r"FW-\d+"), "order FW-104.") == Score(1.0, "FW-104")
    assert score(matches(r"(?i)answer: (\w+)"), "Answer: refund.") == Score(1.0, "refund")
    assert score(matches(r"a(b)?"), "a") == Score(1.0, "")
    given = score(matches(r"^\d+$"), "none")
    assert given == Score(0.0, explanation=r"'^\\d+$' is not found in 'none'")


@pytest.mark.parametrize("pattern", ["(", None, 7, b"a"])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(ValueError, match="no regular expression"):
        matches(pattern)


# Numbers


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It costs £1,234.50.", 1234.5),
        ("Das kostet 1.234,50 €.", 1234.5),
        ("Cela coûte 1 234,50 €", 1234.5),
        ("Cela coûte 1\u202f234,50 €", 1234.5),
        ("CHF 1'234.50", 1234.5),
        ("1,234", 1234),
        ("1.234", 1.234),
        ("1.234.567", 1234567),
        ("1,234,567.8", 1234567.8),
        ("12,5", 12.5),
        ("0,125", 0.125),
        (".5 kg", 0.5),
        ("45kg", 45),
        ("-5", -5),
        ("−5 °C", -5),
        ("-£5.00", -5),
        ("3-5 days", 5),
        ("between 3 and 5, at most", 5),
        ("1, 2, 3", 3),
        ("1,2,3", 3),
        ("2024, 300 units", 300),
        ("1.5e3", 1500),
        ("You get £45 for order FW-10400.", 45),
        ("£45, tracked as PP598029050", 45),
        ("45 %", 45),
        ("first 7, then **42**", 42),
        ("20\n000", 0),
    ],
)
def test_the_last_number_is_read_in_english_and_european_notation(text, wanted):
    assert score(number(), text, wanted).value == 1, score(number(), text, wanted)
    assert value(number(), text, wanted + 1) == 0


@pytest.mark.parametrize("text", ["none", "FW-10400", "order A4_5", "", "five"])
def test_without_a_number_the_answer_is_wrong(text):
    assert score(number(), text, 5).explanation.startswith("there is no number in")


def test_a_number_may_be_off_by_the_tolerance_and_no_more():
    assert value(number(0.1), "0.3", 0.2) == 1
    assert value(number(0.1), "45.1", 45) == 1
    assert value(number(0.1), "45.1001", 45) == 0
    assert score(number(1), "12", 10) == Score(0.0, "12", "said 12 instead of 10")
    assert value(number(), "0.30000000000000004", 0.3) == 1


def test_a_targets_number_may_stand_in_a_text():
    assert value(number(), "1234,5", "£1,234.50") == 1
    for target in ("none", True, [5], math.inf, "9e999"):
        assert score(number(), "5", target).value is None


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf, "1", None])
def test_a_tolerance_is_a_number_from_0(tolerance):
    with pytest.raises(ValueError, match="tolerance must be"):
        number(tolerance)


# Labels

INTENTS = ["order_status", "refund", "refund status"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("refund", "refund"),
        ("Intent: Order status.", "order_status"),
        ("ORDER-STATUS", "order_status"),
        ('{"intent": "refund"}', "refund"),
        ("refund, I mean refund", "refund"),
        ("The intent is refund_status", "refund status"),
    ],
)
def test_the_label_that_was_said_is_found(text, said):
    for target in INTENTS:
        given = score(label(INTENTS), text, target)
        assert (given.value, given.answer) == (float(target == said), said)


def test_no_label_or_several_is_invalid():
    assert score(label(INTENTS), "refunds", "refund") == Score(
        0.0, explanation="invalid: none of the labels stands in 'refunds'"
    )
    assert score(label(INTENTS), "refund or order status", "refund") == Score(
        0.0, explanation="invalid: says several labels, order_status, refund"
    )


def test_with_case_a_label_can_be_a_letter():
    assert score(label(["A", "B"], case=True), "It's a B", "B") == Score(1.0, "B")
    assert value(label(["A", "B"]), "It's a B", "B") == 0


def test_a_target_that_is_no_label_is_not_scored():
    assert score(label(INTENTS), "refund", "exchange").value is None
    assert score(label(INTENTS), "refund", 5).value is None
    assert score(label(INTENTS), "refund", "Refund").value == 1


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "A"], ["a_b", "a b"], ["a", 1], ["a", " "]])
def test_labels_must_be_told_apart(labels):
    with pytest.raises(ValueError, match="at least two different texts"):
        label(labels)


# JSON


def test_an_answer_follows_the_schema_or_the_explanation_says_where_not():
    assert score(schema(PRICE), ' {"price": 5} ') == Score(1.0)
    assert score(schema(PRICE), '{"price": "5"}').explanation == "$.price: '5' is not of type 'number'"
    assert score(schema(PRICE), "{}").explanation == "$: 'price' is a required property"
    assert score(schema(PRICE), '```json\n{"price": 5}\n```').explanation.startswith(
        "not JSON: it stands in a fence of backticks"
    )
    assert value(schema(PRICE), '{"price": NaN}') == 0


def test_of_many_errors_a_few_are_named():
    given = score(schema({"items": {"type": "string"}}), json.dumps(list(range(100_000))))
    assert given.explanation.count("is not of type") == 5


def test_a_schemas_reference_is_not_fetched():
    given = score(schema({"$ref": "http://127.0.0.1:9/schema.json"}), "{}")
    assert given.value is None and "Unresolvable" in given.explanation


def test_what_is_no_schema_is_refused():
    with pytest.raises(ValueError, match=r"no JSON Schema: .* at \$"):
        schema({"type": "nothing"})


SLOTS = {"order_id": "FW-104", "quantity": 2, "gift": False, "note": None}


def test_fields_are_compared_one_by_one_and_the_wrong_ones_named():
    said = {"order_id": "fw-104 ", "quantity": 2.0, "gift": 0, "extra": 1}
    assert score(fields(), json.dumps(said), SLOTS) == Score(0.75, explanation="gift: 0 instead of False")
    few = {"order_id": "FW-104", "quantity": 2}
    assert score(fields(), "{}", few).explanation == (
        "order_id: nothing instead of 'FW-104'; quantity: nothing instead of 2"
    )
    assert score(fields(["order_id", "note"]), json.dumps(said), SLOTS) == Score(1.0)
    assert value(fields(), json.dumps(SLOTS), json.dumps(SLOTS)) == 1


def test_fields_may_hold_lists_and_objects():
    target = {"items": [{"sku": "A1", "n": 1}, {"sku": "B2", "n": 2}]}
    assert value(fields(), '{"items": [{"n": 1, "sku": "a1"}, {"sku": "B2", "n": 2}]}', target) == 1
    assert value(fields(), '{"items": [{"sku": "B2", "n": 2}, {"sku": "A1", "n": 1}]}', target) == 0
    assert value(fields(), '{"items": [{"sku": "A1", "n": 1}]}', target) == 0


def test_an_answer_without_fields_is_wrong():
    assert score(fields(), "[]", SLOTS).explanation == "said [] instead of a JSON object"
    assert score(fields(), "five", SLOTS).explanation.startswith("not JSON")


def test_a_target_without_the_fields_is_not_scored():
    assert score(fields(["colour"]), "{}", SLOTS).explanation == "the target has no field colour"
    for target in ("FW-104", "[]", [], {}, 5):
        assert score(fields(), "{}", target).value is None


@pytest.mark.parametrize("names", ["order_id", []])
def test_fields_are_named_in_a_list(names):
    with pytest.raises(ValueError, match="names must be a list"):
        fields(names)


# Tools


def called(*calls):
    return Answer(None, tool_calls=[{"name": name, "arguments": arguments} for name, arguments in calls])


def tools(answer, target, **arguments):
    return tool_call(**arguments)(answer, Sample("Where is FW-104?", target))


LOOK_UP = {"name": "look_up", "arguments": {"id": "FW-104", "n": 1}}


def test_the_tool_and_its_arguments_must_be_right():
    assert tools(called(("look_up", '{"n": 1.0, "id": "FW-104"}')), LOOK_UP).value == 1
    for wrong in ('{"id": "FW-104"}', '{"id": "fw-104", "n": 1}', '{"id": "FW-104", "n": 1, "x": 0}'):
        assert tools(called(("look_up", wrong)), LOOK_UP).value == 0
    given = tools(called(("refund", "{}")), LOOK_UP)
    assert given.value == 0 and given.answer == "refund({})"
    assert given.explanation == ("look_up({'id': 'FW-104', 'n': 1}) is missing; refund({}) is not asked for")


def test_a_targets_call_may_leave_the_arguments_open_or_be_written_as_the_api_does():
    assert tools(called(("look_up", '{"id": 1}')), {"name": "look_up"}).value == 1
    api = {"id": "call_0", "type": "function", "function": {"name": "look_up", "arguments": '{"id": 1}'}}
    assert tools(called(("look_up", {"id": 1})), api).value == 1
    assert tools(Answer(None, tool_calls=[api]), {"name": "look_up", "arguments": {"id": 1}}).value == 1


def test_several_calls_may_come_in_any_order_and_none_twice():
    target = [{"name": "look_up"}, {"name": "look_up", "arguments": {"id": 1}}, {"name": "greet"}]
    good = [("greet", ""), ("look_up", '{"id": 1}'), ("look_up", '{"id": 2}')]
    assert tools(called(*good), target).value == 1
    assert tools(called(*good, good[0]), target).value == 0
    assert tools(called(*good[1:]), target).explanation == "greet() is missing"


def test_where_nothing_is_to_be_called_a_call_is_wrong():
    assert tools(Answer("Hello"), []).value == 1
    assert tools(called(("greet", "{}")), []).value == 0


def test_arguments_can_be_left_out_of_the_comparison():
    said = called(("look_up", '{"id": "FW-104", "n": 1, "reason": "asked"}'))
    assert tools(said, LOOK_UP).value == 0
    assert tools(said, LOOK_UP, ignore=["reason"]).value == 1


@pytest.mark.parametrize("arguments", ["{", "[]", '"id"', "5"])
def test_arguments_that_are_no_json_object_are_wrong_in_an_answer_and_no_use_in_a_target(arguments):
    assert tools(called(("look_up", arguments)), LOOK_UP).value == 0
    assert tools(called(), {"name": "look_up", "arguments": arguments}).value is None
    assert tools(called(), {"arguments": {}}).value is None


# Meaning, with vectors that count words


def test_similar_is_the_cosine_to_the_nearest_target():
    client = Client()
    near = similar(model=MODEL, client=client)
    assert value(near, "your parcel", "your parcel") == pytest.approx(1)
    assert value(near, "your parcel", ["blue tent", "your order"]) == pytest.approx(0.5)
    assert value(similar(0.5, model=MODEL, client=client), "your parcel", "your order") == 1
    given = score(similar(0.6, model=MODEL, client=client), "your parcel", "your order")
    assert given == Score(0.0, explanation="cosine 0.500")


def test_a_text_is_embedded_once():
    client = Client()
    near = similar(model=MODEL, client=client)
    for text in ("a parcel", "the parcel", "a parcel"):
        value(near, text, "your parcel")
    assert client.embedded == [["a parcel", "your parcel"], ["the parcel"]]


def test_what_is_too_long_for_a_model_is_not_sent():
    client = Client()
    long = "word " * (LONGEST // 5) + "!"
    use = {"model": MODEL, "client": client}
    for scorer in (similar(**use), faithful(PASSAGES, **use), model_graded("Is it polite?", **use)):
        given = score(scorer, long, "yes")
        assert given.value is None and "100,00" in given.explanation
    assert all(long not in batch for batch in client.embedded) and client.requests == []


@pytest.mark.parametrize("threshold", [2, -1.5, "0.5", math.nan])
def test_a_threshold_is_a_cosine(threshold):
    for factory in (lambda t: similar(t), lambda t: faithful(PASSAGES, t)):
        with pytest.raises(ValueError, match="threshold must be from -1 to 1"):
            factory(threshold)


def support(text, passages=PASSAGES, threshold=0.5, metadata=None):
    scorer = faithful(passages, threshold, model=MODEL, client=Client())
    return score(scorer, text, passages=metadata)


def test_sentences_without_support_are_counted_and_named():
    given = support("Unused items may be returned within 30 days. Tents glow in the dark!")
    assert given.value == 0.5
    assert given.explanation.startswith("not supported: 'Tents glow in the dark!' (nothing nearer than 0.")
    assert support("- Unused items may be returned\n- We ship to the UK").value == 1


def test_a_number_must_stand_in_the_passage_that_is_near():
    given = support("Unused items may be returned within 60 days.")
    assert given.value == 0
    assert given.explanation.endswith("(60 is not in the passage)")
    assert support("Unused items may be returned within 30.0 days.").value == 1
    assert support("Refunds take 5 working days.").value == 1
    # 30 stands in the other passage only.
    assert support("We ship to the UK within 30.", threshold=0.7).value == 0
    assert support("We ship to the UK FW-104.").explanation.endswith("(fw-104 is not in the passage)")
    assert support("1. We ship to the UK").value == 1


def test_passages_come_from_a_list_the_sample_or_a_function():
    class Hit:
        text = PASSAGES[1]

    assert support("We ship to the UK.", None, metadata=PASSAGES).value == 1
    assert support("We ship to the UK.", lambda answer, sample: [Hit()]).value == 1
    for none in ([], [" "]):
        given = support("We ship to the UK.", none)
        assert given == Score(None, explanation="there are no passages to compare the answer with")
    assert support("We ship.", None).value is None
    assert support("We ship.", [5]).explanation == "a passage must be a text, not 5"
    with pytest.raises(ValueError, match="in brackets"):
        faithful("We ship to the UK.")


# A model as judge


def test_the_verdict_is_constrained_and_the_transcript_kept():
    client = Client(verdict("partly"))
    choices = {"right": 1, "partly": 0.5, "wrong": 0}
    graded = model_graded("Is it right?", choices, model=MODEL, client=client, seed=7)
    given = score(graded, "It has left.", "It left on Monday.")
    assert (given.value, given.answer) == (0.5, "partly")
    (request,) = client.requests
    form = request["response_format"]["json_schema"]["schema"]
    assert form["properties"]["verdict"]["enum"] == list(choices)
    assert (request["temperature"], request["seed"]) == (0, 7)
    told = request["messages"][1]["content"]
    for part in ("Is it right?", "Where is my parcel?", "It has left.", "It left on Monday."):
        assert part in told
    assert given.explanation.startswith('the judge said: {"verdict": "partly"}') and told in given.explanation


def test_the_judge_sees_a_reference_only_where_there_is_one_and_a_conversation_as_it_was():
    client = Client(verdict("yes"), verdict("yes"))
    graded = model_graded("Is it polite?", model=MODEL, client=client)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert graded(Answer("Bye"), Sample(turns)).value == 1
    assert graded(Answer("Bye"), Sample(turns, {"tone": "é"})).value == 1
    first, second = (request["messages"][1]["content"] for request in client.requests)
    assert "user: Hi\nassistant: Hello" in first and "Reference" not in first
    assert 'Reference answer:\n{"tone": "é"}' in second


@pytest.mark.parametrize("said", ["yes", verdict("perhaps"), verdict(["yes"]), "[]", "", "null", '{"a": 1}'])
def test_a_judge_that_gives_no_verdict_scores_nothing(said):
    given = score(model_graded("Is it polite?", model=MODEL, client=Client(said)), "Bye")
    assert given.value is None
    assert given.explanation.startswith("the judge gave none of the verdicts yes, no")
    assert f"the judge said: {said}" in given.explanation


@pytest.mark.parametrize(
    "rubric, choices", [("", None), (None, None), ("r", {"yes": 1}), ("r", {"a": 1, "b": "x"})]
)
def test_a_rubric_and_choices_that_cannot_be_used_are_refused(rubric, choices):
    with pytest.raises(ValueError, match=r"rubric must be|choices must be"):
        model_graded(rubric, choices)


def preferred(*verdicts):
    return prefer(
        "Gone.", "It is on its way.", "Where is it?", model=MODEL, client=Client(*map(verdict, verdicts))
    )


def test_an_answer_is_preferred_only_if_it_wins_in_both_places():
    assert preferred("1", "2") == "first"
    assert preferred("2", "1") == "second"
    assert preferred("1", "1") == preferred("2", "2") == "inconsistent"
    assert preferred("1", "1").positions == (1, 1)


def test_each_order_is_asked_and_kept():
    client = Client(verdict("2"), verdict("1"))
    found = prefer("Gone.", "On its way.", "Where is it?", rubric="Be kind.", model=MODEL, client=client)
    one, two = (request["messages"][1]["content"] for request in client.requests)
    assert "Answer 1:\nGone.\n\nAnswer 2:\nOn its way." in one and "Be kind." in one
    assert "Answer 1:\nOn its way.\n\nAnswer 2:\nGone." in two
    assert one in found.transcript and two in found.transcript
    assert pickle.loads(pickle.dumps(found)).positions == found.positions == (2, 1)


def test_a_preference_needs_two_answers_and_a_verdict():
    for first in (None, "", " ", "a" * (LONGEST + 1)):
        with pytest.raises(ValueError, match="first must be a text"):
            prefer(first, "b", "Where is it?", model=MODEL, client=Client())
    with pytest.raises(RuntimeError, match="none of the verdicts 1, 2"):
        preferred("1", "3")


def test_a_judge_that_goes_by_the_place_is_caught():
    pairs = [(1, 2)] * 4 + [(2, 1)] * 2 + [(1, 1)] * 12 + [(2, 2)] * 2
    found = position_bias(map(Preference, pairs))
    assert {what: one.value for what, one in found.items()} == {
        "by the answers": 0.3,
        "always place 1": 0.6,
        "always place 2": 0.1,
    }
    one = found["always place 1"]
    assert one.n == 20 and one.low < 0.6 < one.high
    assert all(one.value is None for one in position_bias([]).values())


# Agreement with people


def pairs(n, right, labels, seed):
    rng = random.Random(seed)
    human = [rng.choice(labels) for _ in range(n)]
    return [one if rng.random() < right else rng.choice(labels) for one in human], human


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed):
    judged, human = pairs(60, 0.7, ["a", "b", "b", "c"], seed)
    found = agreement(judged, human)
    assert found.kappa.value == pytest.approx(cohen_kappa_score(judged, human), abs=1e-12)
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.share.value == sum(map(str.__eq__, judged, human)) / 60
    assert found.table.to_numpy().sum() == 60 and found.table.loc["a", "b"] == list(
        zip(human, judged, strict=True)
    ).count(("a", "b"))


@pytest.mark.parametrize(("n", "right", "labels"), [(30, 0.95, "ab"), (60, 0.7, "aaab"), (100, 0.8, "abcd")])
def test_the_interval_of_kappa_holds_the_true_value_about_as_often_as_it_says(n, right, labels):
    true = right  # of such a judge: it copies, or draws as people do
    held = 0
    for seed in range(400):
        kappa = agreement(*pairs(n, right, labels, seed)).kappa
        held += kappa.value is None or kappa.low <= true <= kappa.high
    assert held / 400 > 0.92


def test_full_agreement_on_few_is_no_proof():
    found = agreement(["a", "b", "a", "b", "a"], ["a", "b", "a", "b", "a"])
    assert found.kappa.value == found.kappa.high == 1
    assert found.kappa.low < 0.2


def test_agreement_that_chance_explains_is_not_defined():
    assert agreement(["a"] * 9, ["a"] * 9).kappa.why.startswith("both gave only the label 'a'")
    assert agreement([], []).kappa.why == "no sample has a label from both"
    assert str(agreement([], [])).startswith("Cohen's kappa not defined: ")
    constant = agreement(["a"] * 9, ["a"] * 6 + ["b"] * 3).kappa
    assert constant.value == 0 and constant.low <= 0 <= constant.high
    opposed = agreement(["a", "b"] * 5, ["b", "a"] * 5).kappa
    assert opposed.value == opposed.low == -1


def test_labels_are_paired_by_id_and_missing_ones_left_out():
    judged = {"1": "a", "2": "b", "3": None, "4": "a", "5": "b"}
    human = {"5": "b", "1": "a", "2": "a", "3": "a", "9": "a", "4": math.nan}
    found = agreement(judged, human)
    assert found.kappa.n == 3 and found.share.value == pytest.approx(2 / 3)
    same = agreement(["a", "b", "b", None], ["a", "a", "b", "a"])
    assert same.kappa == found.kappa
    assert "<table" in found._repr_html_() and "n = 3" in found._repr_html_()


@pytest.mark.parametrize("human", [["a"], {"1": "a"}])
def test_labels_that_cannot_be_paired_are_refused(human):
    with pytest.raises(ValueError, match="judged"):
        agreement(["a", "b"], human)


# With the course's models


def test_a_real_embedding_is_near_what_means_the_same(client):
    near = similar(client=client)
    target = "Standard delivery arrives in 3 to 5 working days."
    same, other = value(near, "It takes three to five days.", target), value(near, "Tents are blue.", target)
    assert other < 0.4 < 0.6 < same
    assert score(near, "word " * 1_000, target).explanation.startswith("could not be scored: BadRequestError")


def test_a_real_embedding_tells_supported_sentences_from_invented_ones(client):
    passage = (
        "Unused items may be returned within 30 days of delivery. Refunds go to the original payment method."
    )
    given = score(
        faithful([passage], client=client),
        "You can return an unused jacket within 30 days. You can return it within 60 days. "
        "Your refund is paid to the card you used. We also ship to the moon for free.",
    )
    assert given.value == 0.5
    assert "60 is not in the passage" in given.explanation and "moon" in given.explanation


def test_a_real_model_judges_and_compares(client):
    given = score(
        model_graded("Is the answer polite?", client=client), "Dear Ann, your parcel is on its way."
    )
    assert given.value in (0, 1) and given.answer in ("yes", "no")
    found = prefer("On its way.", "Go away.", "Where is my parcel?", client=client)
    assert found in ("first", "second", "inconsistent") and set(found.positions) <= {1, 2}
