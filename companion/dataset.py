"""Training examples: OpenAI's chat JSONL, checked, looked through, split, described and made.

An example is a dict as OpenAI's supervised fine-tuning takes it (the `FineTuneChatRequestInput` schema of
https://platform.openai.com/docs/api-reference/fine-tuning): {"messages": [...]}, and where tools are called
"tools" and "parallel_tool_calls". An assistant's message may carry "weight", 0 or 1: whether it is learnt.
Text only. This module trains nothing, and sends nothing but what `describe` lets its client count.
"""

from __future__ import annotations

import csv
import html
import json
import os
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from companion.dataset_format import LONGEST_LINE as LONGEST_LINE
from companion.dataset_format import MOST_PROBLEMS as MOST_PROBLEMS
from companion.dataset_format import DatasetError, Example, Found, Problem, text_of, validate

if TYPE_CHECKING:
    import pandas as pd
    from openai import OpenAI

# Files


def load(path: str | os.PathLike) -> list[Example]:
    """The examples of a JSONL file. Raises DatasetError where `validate` finds a problem."""
    if problems := validate(path):
        raise DatasetError(problems, path)
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line]


def save(examples: Iterable[Example], path: str | os.PathLike) -> None:
    """Write examples as JSONL, replacing the file whole or not at all.

    Raises DatasetError, and writes nothing, where `validate` finds a problem.
    """
    examples = list(examples)
    if problems := validate(examples):
        raise DatasetError(problems)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Is it good?

_PERSONAL = {  # code: (what it is, in words; where it may stand). Rather miss one than cry wolf.
    "email_address": ("e-mail address", re.compile(r"\b[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b")),
    "card_number": (
        "card number",
        re.compile(
            r"(?<![\w-])(?:[3-6]\d{3}([ -]?)\d{4}\1\d{4}\1\d{1,7}|3[47]\d\d([ -]?)\d{6}\2\d{5})(?![\w-])"
        ),
    ),
    "iban": ("IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")),
    "phone_number": (
        "phone number",
        re.compile(
            r"(?<![\w.-])(?:\+\d{1,3}(?:[ -]?\(0\))?(?:[ -]?\d{2,5}){2,4}"  # international
            r"|07\d{3}[ -]?\d{3}[ -]?\d{3}|\(?0[12]\d{2,3}\)?[ -]\d{3}[ -]?\d{3,4})(?![\w-])"  # British
        ),
    ),
    "postcode": (
        "British postcode",
        re.compile(r"\b(?:[A-PR-UWYZ][A-HK-Y]?\d[\dA-HJKMNPR-Y]?) \d[ABD-HJLNP-UW-Z]{2}\b"),
    ),
}


def review(examples: Sequence[Example]) -> list[Problem]:
    """What a person should look at before training: nothing here keeps examples from being used.

    - Personal data: e-mail addresses, card numbers (Luhn's check), IBANs (ISO 7064's), phone numbers and
      British postcodes, found by their form. Names and addresses are not found.
    - "duplicate": the same messages as an earlier example. "near_duplicate": what the user says has a cosine
      of 0.9 or more with an earlier example's, by its three-letter pieces. "conflicting_answers": the
      same conversation as in an earlier example, but another last answer.
    - "few_examples": fewer than 10, which fine-tuning jobs refuse.

    Codes of personal data are email_address, card_number, iban, phone_number and postcode.
    """
    found = [
        Problem(line, code, message)
        for line, example in enumerate(examples, start=1)
        for code, message in _personal_data(example)
    ]
    same: dict[str, int] = {}
    asked: dict[str, int] = {}
    told: set[int] = set()
    for line, example in enumerate(examples, start=1):
        messages = [{**message, "weight": None} for message in example["messages"]]
        first = same.setdefault(_words(json.dumps(messages, sort_keys=True)), line)
        before = asked.setdefault(
            _words(json.dumps([messages[:-1], example.get("tools")], sort_keys=True)), line
        )
        if first != line:
            found.append(Problem(line, "duplicate", f"the same messages as line {first}: leave one out"))
            told.add(line)
        elif before != line:
            message = f"the same question as line {before}, but another answer: decide for one"
            found.append(Problem(line, "conflicting_answers", message))
            told.add(line)
    nearest: dict[int, int] = {}
    for i, j in _twins([_question(example) for example in examples]):
        nearest[j + 1] = min(i + 1, nearest.get(j + 1, i + 1))
    for line, first in nearest.items():
        if line not in told:
            found.append(Problem(line, "near_duplicate", f"says nearly the same as line {first}"))
    if 0 < len(examples) < 10:
        message = f"{len(examples)} examples: a job takes 10 or more, and 50 are a good start"
        found.append(Problem(0, "few_examples", message))
    return sorted(found, key=lambda problem: problem.line)


def _personal_data(example: Example) -> Found:
    text = "\n".join(_said(message) for message in example["messages"])
    for code, (name, pattern) in _PERSONAL.items():
        hits = (match[0] for match in pattern.finditer(text))
        if code == "card_number":
            hits = filter(_is_card, hits)
        elif code == "iban":
            hits = filter(None, map(_iban_in, hits))
        elif code == "phone_number":
            hits = (hit for hit in hits if 9 <= sum(map(str.isdigit, hit)) <= 15)
        if hits := list(dict.fromkeys(hits)):
            shown = ", ".join(f"{hit[:2]}…{hit[-1]}" for hit in hits[:3])
            some = f"a {name}" if len(hits) == 1 else f"{len(hits)} different {name}s"
            some = some.replace("a e-", "an e-").replace("a IBAN", "an IBAN").replace("addresss", "addresses")
            yield code, f"holds {some} ({shown}): replace it unless it is invented"


def _is_card(written: str) -> bool:
    digits = [int(c) for c in written if c.isdigit()]
    doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return len(digits) >= 13 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + doubled) % 10 == 0


def _iban_in(written: str) -> str | None:
    """The IBAN that a text begins with: words in capitals may have been caught at its end."""
    while len(iban := written.replace(" ", "")) >= 15:
        if int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1:
            return written
        written = written.rpartition(" ")[0]
    return None


def _said(message: Mapping[str, Any]) -> str:
    calls = (call["function"]["arguments"] for call in message.get("tool_calls") or ())
    return "\n".join([text_of(message), *calls])


def _question(example: Example) -> str:
    """What the user says in it; where no user does, what is said at all but for instructions."""
    messages = example["messages"]
    asked = [text_of(message) for message in messages if message["role"] == "user"]
    return "\n".join(asked or [_said(m) for m in messages if m["role"] not in ("system", "developer")])


def _twins(texts: Sequence[str], least: float = 0.9) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of texts of the same words or whose three-letter pieces have a cosine of `least`.

    A piece that stands in a text n times weighs 1 + log n. A wrong letter in a short question keeps 0.9;
    another question on the same matter has 0.5 to 0.8. (Rarer pieces are given no more weight, as TF-IDF
    would: that makes a typo the most telling part of a text.) Of texts of the same words, each is paired with
    the first only.
    """
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.random_projection import SparseRandomProjection

    first: dict[str, int] = {}
    pairs = [(i, j) for j, text in enumerate(texts) if (i := first.setdefault(_words(text), j)) != j]
    places = list(first.values())
    if len(places) < 2:
        return pairs
    counts = CountVectorizer(analyzer="char_wb", ngram_range=(3, 3), dtype=np.float32).fit_transform(first)
    if len(places) >= 20:  # what nearly all say, such as an instruction, makes none of them alike
        shares = np.bincount(counts.indices, minlength=counts.shape[1]) / len(places)
        counts = counts[:, shares <= 0.9]
    vectors = TfidfTransformer(use_idf=False, sublinear_tf=True).fit_transform(counts)
    # Candidates by a projection to a few dimensions, whose cosines are off by 0.01 near 0.9; then exactly.
    if vectors.shape[1] > 256:
        rough = SparseRandomProjection(256, dense_output=True, random_state=0).fit_transform(vectors)
        rough /= np.maximum(np.linalg.norm(rough, axis=1, keepdims=True), 1e-12)
    else:
        rough = vectors.toarray()
    for start in range(0, len(places), 1000):
        near = rough[start : start + 1000] @ rough[start:].T >= least - 0.06
        for i, j in np.argwhere(near) + start:
            if i < j and vectors[i].multiply(vectors[j]).sum() >= least:
                pairs.append((places[i], places[j]))
    return pairs


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# Parts


class Parts(NamedTuple):
    """The examples to train on, to watch the training with, and to judge the result by."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split(
    examples: Sequence[Example],
    validation: float = 0.15,
    test: float = 0.0,
    *,
    stratify: Callable[[Example], Any] | Sequence[Any] | None = None,
    seed: int = 0,
) -> Parts:
    """Part examples into train, validation and test; each keeps their order.

    Examples whose users say the same or nearly the same (see `review`) stay on one side, so that no part
    gives another's answers away.

    Args:
        examples: as `load` gives them.
        validation: the share of examples, from 0 to 1, to watch the training with.
        test: the share to judge the result by.
        stratify: a label for each example, or a function that gives it: parts get the same share of each.
        seed: which of the many such splits.

    Raises:
        ValueError: shares below 0 or that leave nothing to train on, or not one label for each example.
    """
    shares = (1 - validation - test, validation, test)
    if min(validation, test) < 0 or shares[0] <= 0:
        raise ValueError(
            f"validation={validation} and test={test} must be shares that leave some to train on"
        )
    labels = [stratify(example) for example in examples] if callable(stratify) else stratify
    labels = [None] * len(examples) if labels is None else list(labels)
    if len(labels) != len(examples):
        raise ValueError(f"stratify has {len(labels)} labels for {len(examples)} examples")
    groups = _groups(len(examples), _twins([_question(example) for example in examples]))
    random.Random(seed).shuffle(groups)
    groups.sort(key=lambda group: str(labels[group[0]]))
    # Dealt out in turn to the part that lags most behind its share: so shares hold for each run of a label.
    parts: tuple[list[int], ...] = ([], [], [])
    dealt = 0
    for group in groups:
        dealt += len(group)
        behind = [
            share * dealt - len(part) if share else -1 for share, part in zip(shares, parts, strict=True)
        ]
        parts[behind.index(max(behind))].extend(group)
    return Parts(*([examples[i] for i in sorted(part)] for part in parts))


def _groups(size: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Numbers below `size`, those joined by pairs together."""
    leaders = list(range(size))

    def leader(i: int) -> int:
        while leaders[i] != i:
            leaders[i] = i = leaders[leaders[i]]
        return i

    for i, j in pairs:
        leaders[leader(j)] = leader(i)
    groups = defaultdict(list)
    for i in range(size):
        groups[leader(i)].append(i)
    return list(groups.values())


# What is in it, and what would it take?


@dataclass(frozen=True)
class Description:
    """What `describe` found. None stands for what was not asked for or cannot be said.

    `roles` counts messages, `turns` the user's messages in each example, `tokens` the tokens of each example,
    `too_long` the lines of those longer than `context`; `training_tokens` are those of all epochs, `minutes`
    an estimate, `cost` in the currency of the price.
    """

    examples: int
    roles: dict[str, int]
    turns: tuple[int, ...] = field(repr=False)
    n_epochs: int
    context: int
    tokens: tuple[int, ...] | None = field(default=None, repr=False)
    minutes: float | None = None
    price_per_million: float | None = None

    @property
    def too_long(self) -> list[int] | None:
        """The lines of the examples that have more tokens than the context."""
        return None if self.tokens is None else [i for i, n in enumerate(self.tokens, 1) if n > self.context]

    @property
    def training_tokens(self) -> int | None:
        """The tokens of all epochs."""
        return None if self.tokens is None else self.n_epochs * sum(self.tokens)

    @property
    def cost(self) -> float | None:
        """What training costs at the price, in its currency."""
        if self.training_tokens is None or self.price_per_million is None:
            return None
        return self.training_tokens * self.price_per_million / 1e6

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._rows())

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        rows = (
            f'<tr><th scope="row" {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>'
            for name, value in self._rows()
        )
        return f"<table><caption>Training examples</caption><tbody>{''.join(rows)}</tbody></table>"

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "examples", f"{self.examples:,}"
        yield "messages", ", ".join(f"{n:,} {role}" for role, n in self.roles.items())
        yield "user turns in an example", _spread(self.turns)
        if self.tokens is not None:
            yield "tokens in an example", _spread(self.tokens)
            lines = ", ".join(map(str, self.too_long[:10])) + (", …" if len(self.too_long) > 10 else "")
            yield (
                f"longer than {self.context:,} tokens",
                f"{len(self.too_long)} (lines {lines})" if lines else "0",
            )
            epochs = "1 epoch" if self.n_epochs == 1 else f"{self.n_epochs} epochs"
            yield f"training tokens in {epochs}", f"{self.training_tokens:,}"
        if self.minutes is not None:
            yield "minutes of training, about", f"{self.minutes:.1f}"
        if self.cost is not None:
            yield f"cost at {self.price_per_million:g} a million tokens", f"{self.cost:.2f}"


def describe(
    examples: Sequence[Example],
    client: OpenAI | None = None,
    model: str | None = None,
    *,
    n_epochs: int = 3,
    price_per_million: float | None = None,
    context: int = 2048,
) -> Description:
    """Say what is in a set of examples, and what training on it would take.

    Tokens are the model's own, counted by the endpoint (POST /v1/responses/input_tokens), a few more or less
    than in training, where the template differs by an example's end. Minutes are an estimate. They come from
    the speed of the endpoint's last job that succeeded, its waiting included. Where there is none, they
    assume 0.5 GFLOP a token, as LoRA on the course's model takes, at 35 % of the speed at which this
    machine multiplies matrices (numpy, float32).

    Args:
        examples: as `load` gives them.
        client: an `openai.OpenAI`; without one nothing that needs tokens is said.
        model: whose tokens; needed with a client.
        n_epochs: how often each example will be seen.
        price_per_million: of a million training tokens on a hosted service.
        context: the most tokens that an example may have.

    Raises:
        ValueError: a client without a model.
        openai.OpenAIError: what the endpoint refused.
    """
    if client and not model:
        raise ValueError("model is missing: whose tokens should be counted?")
    roles = Counter(message["role"] for example in examples for message in example["messages"])
    turns = tuple(sum(message["role"] == "user" for message in e["messages"]) for e in examples)
    tokens = minutes = None
    if client:
        with ThreadPoolExecutor(8) as pool:
            tokens = tuple(pool.map(lambda example: _count(example, client, model), examples))
        minutes = n_epochs * sum(tokens) / _tokens_per_second(client) / 60
    return Description(
        len(examples), dict(roles), turns, n_epochs, context, tokens, minutes, price_per_million
    )


def _spread(values: Sequence[int]) -> str:
    ordered = sorted(values) or [0]
    if ordered[0] == ordered[-1]:
        return f"{ordered[0]:,}"
    return f"{ordered[0]:,} to {ordered[-1]:,}, median {ordered[len(ordered) // 2]:,}"


def _count(example: Example, client: OpenAI, model: str) -> int:
    items: list[dict[str, Any]] = []
    for message in example["messages"]:
        text, calls = text_of(message), message.get("tool_calls") or []
        if message["role"] == "tool":
            answered = {"type": "function_call_output", "call_id": message["tool_call_id"], "output": text}
            items.append(answered)
        elif text:
            items.append({"role": message["role"], "content": text})
        items += [{"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls]
    # A conversation that ends with calls is an example, but no request: it wants their results.
    for call in example["messages"][-1].get("tool_calls") or []:
        items.append({"type": "function_call_output", "call_id": call["id"], "output": ""})
    tools = [{"type": "function", **tool["function"]} for tool in example.get("tools", [])]
    extra = {"tools": tools} if tools else {}
    return client.responses.input_tokens.count(model=model, input=items, **extra).input_tokens


def _tokens_per_second(client: OpenAI) -> float:
    import numpy as np
    from openai import NotFoundError

    try:
        for job in client.fine_tuning.jobs.list():
            if job.status == "succeeded" and job.trained_tokens and job.finished_at > job.created_at:
                return job.trained_tokens / (job.finished_at - job.created_at)
    except NotFoundError:  # a server without fine-tuning
        pass
    matrix = np.ones((1024, 1024), dtype=np.float32)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begun)
    return 0.35 * 2 * 1024**3 / min(times) / 5e8


# From a company's data


def from_table(
    frame: pd.DataFrame, text: str, label: str | Sequence[str], *, system: str | None = None
) -> list[Example]:
    """An example for each row: the user says the text, the assistant answers with the label.

    Args:
        frame: any table.
        text: the column of what the user says.
        label: the column of the answer; or several, for an answer in JSON with their names, in their order,
            without spaces and with null for what is missing.
        system: instructions that stand before each, the same that the tuned model is then asked with.

    Raises:
        ValueError: a column that is not there, or a text or a single label that is missing in some row.
    """
    columns = [label] if isinstance(label, str) else list(label)
    if absent := [column for column in (text, *columns) if column not in frame]:
        raise ValueError(f"there is no column {absent[0]!r}: the table has {', '.join(map(str, frame))}")
    examples = []
    for row, (said, *values) in enumerate(zip(frame[text], *(frame[c] for c in columns), strict=True)):
        values = [_plain(value) for value in values]
        answer = _compact(dict(zip(columns, values, strict=True)))
        if isinstance(label, str):
            answer = "" if values[0] is None else str(values[0]).strip()
        for column, value in ((text, _plain(said)), (columns[0], answer)):
            if value is None or not str(value).strip():
                raise ValueError(
                    f"row {row} (counted from 0) has nothing in the column {column!r}: drop it first"
                )
        examples.append(_example([("user", str(said)), ("assistant", answer)], system))
    return examples


def from_csv(
    path: str | os.PathLike, text: str, label: str | Sequence[str], *, system: str | None = None
) -> list[Example]:
    """An example for each row of a CSV file, as `from_table` makes them of a table's.

    path: a file in UTF-8 with a header, its columns parted by commas, semicolons or tabs. All values are
    taken as texts, a label like "None" or "007" too. text, label and system are those of `from_table`, which
    says what is raised; ValueError, too, for a file that is no such table, OSError for one that is not there.
    """
    import pandas as pd

    wanted = {text, label} if isinstance(label, str) else {text, *label}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = max(
                ",;\t", key=lambda one: len(wanted & set(next(csv.reader([first], delimiter=one), [])))
            )
            file.seek(0)
            rows = csv.reader(file, delimiter=separator)
            header = next(rows, [])
            table = []
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {rows.line_num}: {len(row)} values in {len(header)} columns; "
                        f"a text that holds {separator!r} must stand in quotation marks"
                    )
                table.append([value or None for value in row])
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    if not table:
        raise ValueError(f"{path} is empty: a header and a row for each example are needed")
    return from_table(pd.DataFrame(table, columns=header), text, label, system=system)


def from_tickets(frame: pd.DataFrame, *, system: str | None = None) -> list[Example]:
    """Triage of Fernway's tickets: {"intent":…,"urgency":…,"order_id":… or null} to subject and text.

    frame: as `companion.shop.tickets` gives it, or with the columns subject, text, intent, urgency and slots.
    system: as in `from_table`.
    """
    letters = frame["subject"].fillna("") + "\n\n" + frame["text"]
    orders = [slots.get("order_id") for slots in frame["slots"]]
    told = frame[["intent", "urgency"]].assign(text=letters.str.strip(), order_id=orders)
    return from_table(told, "text", ["intent", "urgency", "order_id"], system=system)


def from_dialogues(dialogues: Iterable[Mapping[str, Any]], *, system: str | None = None) -> list[Example]:
    """An example for each conversation, all turns of the assistant learnt.

    dialogues: records with "messages", each with role and content, as `companion.shop.dialogues` gives them.
    What follows the assistant's last turn is left out. system: as in `from_table`.
    """
    examples = []
    for dialogue in dialogues:
        said = [(message["role"], message["content"]) for message in dialogue["messages"]]
        while said and said[-1][0] != "assistant":
            said.pop()
        examples.append(_example(said, system))
    return examples


def _example(said: list[tuple[str, str]], system: str | None) -> Example:
    said = ([("system", system)] if system else []) + said
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def _plain(value: Any) -> Any:
    """A table's value as JSON has it; None where it is missing."""
    import pandas as pd

    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, list | dict) and pd.isna(value):
        return None
    return value if isinstance(value, str | int | float | list | dict) else str(value)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
