"""What is shown in Jupyter: a chat box, a text's tokens, the likeliest next ones, and answers to be labelled.

`token_view` and `next_token_view` give static HTML, which stays in a stored notebook; `chat_box`,
`next_token_box` and `label` need a running kernel. Colours only help the eye: nothing is told by colour
alone, and all of it is laid lightly over the page's own colours, so that it can be read in light and dark.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets

from companion import backend
from companion.chat import Chat, message_html

if TYPE_CHECKING:
    import pandas as pd
    from openai import OpenAI
    from openai.types.completion_choice import Logprobs

LONGEST = 20_000  # characters of an answer that are shown to be labelled
_HUES = (210, 130, 40, 280, 0)
_LEFT = "text-align:left"  # since Jupyter sets tables flush right


@dataclass(frozen=True)
class TokenView:
    """A text's tokens, shown as a row of numbered, framed chips."""

    tokens: tuple[str, ...]

    def _repr_html_(self) -> str:
        chips = (
            '<li style="border:1px solid;border-radius:.3em;padding:0 .35em;white-space:pre;'
            f'background:hsl({_HUES[i % len(_HUES)]} 80% 50% / .2)">'
            f'<small aria-hidden="true">{i + 1} </small>{_code(token)}</li>'
            for i, token in enumerate(self.tokens)
        )
        row = "list-style:none;display:flex;flex-wrap:wrap;gap:.35em;margin:0;padding:0"
        return f'<p>{len(self.tokens)} tokens</p><ol style="{row}">{"".join(chips)}</ol>'


@dataclass(frozen=True)
class NextTokenView:
    """The likeliest tokens after `prompt` and their `probabilities`, from 0 to 1, likeliest first."""

    prompt: str
    probabilities: dict[str, float]

    def _repr_html_(self) -> str:
        rest = max(0.0, 1 - sum(self.probabilities.values()))
        rows = [(_code(token), probability) for token, probability in self.probabilities.items()]
        body = "".join(_bar_row(*row) for row in [*rows, ("<em>all others</em>", rest)])
        return (
            '<table style="width:100%;max-width:40em;color:inherit">'
            f"<caption>What comes after {_code(self.prompt)}</caption>"
            f'<thead><tr><th scope="col" style="{_LEFT}">token</th>'
            f'<th scope="col" colspan="2" style="{_LEFT}">probability</th></tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )


def token_view(text: str, *, model: str | None = None, client: OpenAI | None = None) -> TokenView:
    """Cut `text` into the model's tokens, as the endpoint's legacy completions route echoes them.

    Args:
        text: any text but an empty one.
        model: a model's name; the backend's default chat model if None.
        client: an `openai.OpenAI`; the backend's if None.

    Raises:
        ValueError: the text is no string or empty.
    """
    logprobs = _complete(text, model, client, echo=True, max_tokens=0, logprobs=0)
    return TokenView(tuple(logprobs.tokens))


def next_token_view(
    prompt: str, k: int = 10, *, model: str | None = None, client: OpenAI | None = None
) -> NextTokenView:
    """Show the `k` likeliest tokens after `prompt` as the model weighs them: no sampling, no chat template.

    Args:
        prompt: any text but an empty one.
        k: how many tokens to show, at least 1.
        model: a model's name; the backend's default chat model if None.
        client: an `openai.OpenAI`; the backend's if None.

    Raises:
        ValueError: the prompt is no string or empty, or k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k!r}")
    found = _complete(prompt, model, client, max_tokens=1, logprobs=k).top_logprobs[0]
    likeliest = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:k]
    return NextTokenView(prompt, {token: math.exp(logprob) for token, logprob in likeliest})


def next_token_box(
    prompt: str = "", k: int = 10, *, model: str | None = None, client: OpenAI | None = None
) -> ipywidgets.VBox:
    """`next_token_view` of a text that the learner types: Enter shows what the model would write next.

    Args as in `next_token_view`, but the prompt may be empty. What it raises is shown in one line.
    """
    field = _text_field("Text", prompt, "Write the beginning of a sentence, then press Enter")
    result = ipywidgets.HTML()

    def show() -> None:
        try:
            result.value = next_token_view(field.value, k, model=model, client=client)._repr_html_()
        except Exception as error:
            result.value = _error_html(error)

    _on_enter(field, show)
    if prompt:
        show()
    return ipywidgets.VBox([field, result])


def chat_box(chat: Chat) -> ipywidgets.VBox:
    """A box to talk with `chat` in: Enter or Send sends, the reply grows as it is written, Clear forgets.

    The conversation is `chat.messages`, before and after. A failure is shown in one line, and the message
    stays in the field.
    """
    field = _text_field("Message", "", "Write a message, then press Enter")
    send_button = ipywidgets.Button(description="Send", tooltip="Send the message")
    clear_button = ipywidgets.Button(description="Clear", tooltip="Forget the conversation")
    controls = (field, send_button, clear_button)
    conversation, turn = ipywidgets.HTML(), ipywidgets.HTML()

    def show() -> None:
        conversation.value = chat._repr_html_()

    def send() -> None:
        if not field.value.strip():
            return
        for control in controls:
            control.disabled = True
        asked = turn.value = message_html({"role": "user", "content": field.value})
        reply = ""
        try:
            for piece in chat.stream(field.value):
                reply += piece
                turn.value = asked + message_html({"role": "assistant", "content": reply})
            show()
            field.value = turn.value = ""
        except Exception as error:
            turn.value = _error_html(error)
        finally:
            for control in controls:
                control.disabled = False
        field.focus()

    def clear() -> None:
        chat.clear()
        turn.value = ""
        show()

    _on_enter(field, send)
    send_button.on_click(lambda _: send())
    clear_button.on_click(lambda _: clear())
    show()
    return ipywidgets.VBox([conversation, turn, field, ipywidgets.HBox([send_button, clear_button])])


class Labelling(ipywidgets.VBox):
    """What `label` shows. `labels` are those given so far, as {sample id: label}, in the samples' order."""

    def __init__(self, rows: list[Mapping[str, Any]], labels: list[str], path: Path) -> None:
        self._rows, self._choices, self._path = rows, labels, path
        self._given = _read_labels(path, labels)
        self._progress, self._shown = ipywidgets.HTML(), ipywidgets.HTML()
        self._alert = ipywidgets.HTML()
        self._buttons = [ipywidgets.Button(description=f"{i} {one}") for i, one in enumerate(labels, start=1)]
        for button, one in zip(self._buttons, labels, strict=True):
            button.tooltip = f"Label this answer {one}"
            button.on_click(lambda _, one=one: self._say(one))
        self._back = ipywidgets.Button(description="Back", tooltip="Go back to the answer before")
        self._back.on_click(lambda _: self._show(self._at - 1))
        self._field = _text_field(
            "Label", "", f"Type a number from 1 to {len(labels)}, or 0 to go back, then Enter"
        )
        _on_enter(self._field, self._typed)
        row = ipywidgets.HBox([*self._buttons, self._back], layout=ipywidgets.Layout(flex_flow="row wrap"))
        super().__init__([self._progress, self._shown, row, self._field, self._alert])
        self._show(self._next(0))

    @property
    def labels(self) -> dict[str, str]:
        return {row["id"]: self._given[row["id"]] for row in self._rows if row["id"] in self._given}

    def _next(self, start: int) -> int:
        """The first answer without a label from `start` on, or before it; their number if all have one."""
        order = [*range(start, len(self._rows)), *range(start)]
        return next((i for i in order if self._rows[i]["id"] not in self._given), len(self._rows))

    def _show(self, at: int) -> None:
        self._at, total = at, len(self._rows)
        row = self._rows[at] if at < total else None
        self._alert.value = self._field.value = ""
        self._back.disabled = at == 0
        for button in self._buttons:
            button.disabled = row is None
        said = f"Answer {at + 1} of {total}" if row else f"All {total} answers have a label"
        said += f", {len(self.labels)} labelled" if row else f". They are in {self._path.name}"
        said += f". You said: {self._given[row['id']]}" if row and row["id"] in self._given else ""
        self._progress.value = f'<p role="status">{html.escape(said)}.</p>'
        self._shown.value = _row_html(row) if row else ""

    def _say(self, label: str) -> None:
        id = self._rows[self._at]["id"]
        try:
            _append(
                self._path,
                {"id": id, "label": label, "time": datetime.now(UTC).isoformat(timespec="seconds")},
            )
        except OSError as error:
            self._alert.value = _error_html(error)
            return
        self._given[id] = label
        self._show(self._next(self._at + 1))

    def _typed(self) -> None:
        typed = self._field.value.strip()
        if typed == "0" and self._at > 0:
            self._show(self._at - 1)
        elif typed in map(str, range(1, len(self._choices) + 1)) and self._at < len(self._rows):
            self._say(self._choices[int(typed) - 1])
        else:
            error = ValueError(f"{typed!r} is none of the numbers on the buttons")
            self._alert.value = _error_html(error)


def label(
    answers: Any | pd.DataFrame | Iterable[Mapping[str, Any]], labels: Sequence[str], path: str | os.PathLike
) -> Labelling:
    """Let a person label answers one by one, without a word of what a scorer said of them.

    Each label is written to the file as soon as it is given, and labelling goes on where it stopped. Back
    shows the answer before, to be labelled again. The buttons take Tab and Space; in the field a button's
    number and Enter do the same. The labels, as {sample id: label}, are in the result's `labels`, ready for
    `companion.scorers.agreement`.

    Args:
        answers: an `Evaluation`, or its frame, or records with "id", "input", "answer" and if you like
            "target", which is shown as the reference. Of several epochs the first is shown.
        labels: what can be said, at least two different texts.
        path: the JSONL file: a line a label, with "id", "label" and "time"; for an id that comes twice the
            last one holds. Give each person a file of their own.

    Raises:
        ValueError: no answers, one without an id, two with the same, labels that are not as above, or a file
            that holds something else than these labels.
        OSError: the file cannot be read.
    """
    labels = list(labels)
    if (
        len(labels) < 2
        or len({*map(str, labels)}) < len(labels)
        or not all(isinstance(one, str) and one for one in labels)
    ):
        raise ValueError(f"labels must be at least two different texts, not {labels!r}")
    if hasattr(answers, "frame"):
        answers = answers.frame()
    rows = answers.to_dict("records") if hasattr(answers, "to_dict") else list(answers)
    rows = [row for row in rows if not row.get("epoch")]
    seen = set()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("id"), str) or row["id"] in seen:
            problem = "is there twice" if row.get("id") in seen else "is no text"
            raise ValueError(f"the id of answer {number}, {row.get('id')!r}, {problem}: give each its own")
        seen.add(row["id"])
    if not rows:
        raise ValueError("there are no answers to label")
    return Labelling(rows, labels, Path(path))


def _read_labels(path: Path, labels: list[str]) -> dict[str, str]:
    """The labels in a file, which may not be there yet."""
    given: dict[str, str] = {}
    if not path.exists():
        return given
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # an empty line, or one that was cut off as it was written
        if (
            not isinstance(found, dict)
            or not isinstance(found.get("id"), str)
            or found.get("label") not in labels
        ):
            what = f"line {number} of {path} is none of these labels"
            raise ValueError(
                f"{what} ({', '.join(labels)}): take another file, or the labels it was made with"
            )
        given[found["id"]] = found["label"]
    return given


def _append(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        if file.read() not in (b"", b"\n"):  # a line was cut off, by a kill or a full disk
            line = b"\n" + line
        file.write(line)


def _row_html(row: Mapping[str, Any]) -> str:
    """A sample and its answer, as a conversation."""
    input = row.get("input")
    shown = input if isinstance(input, list) else [{"role": "user", "content": str(input)}]
    text, error = row.get("answer"), row.get("error")
    if not isinstance(text, str):
        text = f"(no answer: {error})" if isinstance(error, str) else "(no answer)"
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}… ({len(text):,} characters in all)"
    parts = [*shown, {"role": "assistant", "content": text}]
    target = row.get("target")
    if target is not None and target == target:  # not NaN, as a frame has it
        target = target if isinstance(target, str) else json.dumps(target, ensure_ascii=False, default=str)
        parts.append({"role": "reference", "content": target})
    return "".join(map(message_html, parts))


def _complete(text: str, model: str | None, client: OpenAI | None, **options) -> Logprobs:
    if not isinstance(text, str) or not text:
        raise ValueError(f"the text must be a string with something in it, not {text!r}")
    completion = (client or backend.client()).completions.create(
        model=model or backend.chat_model(), prompt=text, **options
    )
    return completion.choices[0].logprobs


def _text_field(label: str, value: str, hint: str) -> ipywidgets.Text:
    layout = ipywidgets.Layout(width="100%", max_width="60em")
    return ipywidgets.Text(value, description=label, placeholder=hint, layout=layout)


def _on_enter(field: ipywidgets.Text, act: Callable[[], None]) -> None:
    # Observing the value would also fire when the field is left, and send what was only half written.
    field.on_msg(lambda _, content, buffers: act() if content.get("event") == "submit" else None)


def _code(text: str) -> str:
    """Show text with its whitespace, and what cannot be printed, made visible."""
    shown = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    visible = "".join(shown.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
    return f'<code style="background:none;border:none;color:inherit">{html.escape(visible)}</code>'


def _bar_row(label: str, probability: float) -> str:
    bar = f"height:1em;width:{probability:.1%};min-width:1px;background:currentColor;opacity:.6"
    return (
        f'<tr><th scope="row" style="{_LEFT};white-space:pre">{label}</th>'
        f'<td style="text-align:right">{probability:.1%}</td>'
        f'<td style="width:70%"><div aria-hidden="true" style="{bar}"></div></td></tr>'
    )


def _error_html(error: Exception) -> str:
    line = " ".join(str(error).split())
    return f'<div role="alert"><strong>{type(error).__name__}:</strong> {html.escape(line)}</div>'
