"""What is shown in Jupyter: a chat box, a text's tokens, and the tokens a model would write next.

`token_view` and `next_token_view` give static HTML, which stays in a stored notebook; `chat_box` and
`next_token_box` need a running kernel. Colours only help the eye: nothing is told by colour alone, and all of
it is laid lightly over the page's own colours, so that it can be read in light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ipywidgets

from companion import backend
from companion.chat import Chat, message_html

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.completion_choice import Logprobs

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
