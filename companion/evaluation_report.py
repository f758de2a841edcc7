"""An evaluation as a page of HTML: its summary, and each transcript behind a line that opens.

The page stands alone: no script, and nothing from elsewhere. What models and people wrote is escaped.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from companion.evaluation import Record

KINDS = {"wrong": "wrong", "right": "right", "none": "not scored", "label": "labelled"}
_STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem }
details { border-top: 1px solid #8888; padding: .3rem 0 }
summary { cursor: pointer; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem; font: inherit;
      border-left: .25rem solid #8888; padding-left: .8rem }
th { text-align: left; padding-right: 1rem; vertical-align: top }
"""


def write(path: Path, title: str, summary: str, records: Iterable[Record]) -> Path:
    """Write the page, whole or not at all, and return its path.

    summary: HTML that stands above the transcripts. records: read one by one, so that a long run takes no
    memory.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # A half of a character, which a model can write, is shown as its code.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(_page(title, summary, records))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _page(title: str, summary: str, records: Iterable[Record]) -> Iterator[str]:
    hidden = "\n".join(f"#{kind}:checked ~ main > :not(.{kind}) {{ display: none }}" for kind in KINDS)
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}{hidden}</style></head><body><h1>{html.escape(title)}</h1>{summary}"
    yield "<h2>Samples</h2>"
    for kind, label in {"all": "all", **KINDS}.items():
        checked = " checked" if kind == "all" else ""
        yield f'<input type="radio" name="shown" id="{kind}"{checked}><label for="{kind}">{label}</label>\n'
    yield "<main>\n"
    for record in records:
        yield _entry(record)
    yield "</main></body></html>\n"


def _entry(record: Record) -> str:
    sample, epoch, answer, scores = record
    kind = _kind([score.value for score in scores.values()])
    said = ", ".join(f"{name}: {_shown(score.value)}" for name, score in scores.items())
    name = sample.id + (f", epoch {epoch}" if epoch else "")
    parts = [
        f"<strong>{html.escape(str(message.get('role')))}</strong>{_block(_message(message))}"
        for message in answer.messages
    ]
    if answer.error:
        parts.append(f"<strong>no answer</strong>{_block(answer.error)}")
    parts.append(f"<strong>target</strong>{_block(_text(sample.target))}")
    for scorer, score in scores.items():
        notes = [_shown(score.value)]
        notes += [f"read: {score.answer}"] if score.answer is not None else []
        notes += [score.explanation] if score.explanation else []
        parts.append(f"<strong>{html.escape(scorer)}</strong>{_block(chr(10).join(notes))}")
    if sample.metadata:
        parts.append(f"<strong>metadata</strong>{_block(_text(sample.metadata))}")
    head = html.escape(f"{KINDS[kind]} · {name} · {said}")
    return f'<details class="{kind}"><summary>{head}</summary>{"".join(parts)}</details>\n'


def _kind(values: list[Any]) -> str:
    """Wrong where any number is below 1, right where all are 1 or more."""
    if any(value is None for value in values):
        return "none"
    numbers = [value for value in values if not isinstance(value, str)]
    if not numbers:
        return "label"
    return "wrong" if any(value < 1 for value in numbers) else "right"


def _shown(value: Any) -> str:
    return "not scored" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _message(message: dict[str, Any]) -> str:
    content = message.get("content")
    lines = [_text(content)] if content else []
    for call in message.get("tool_calls") or ():
        lines.append(f"calls {_text(call.get('function', call))}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _block(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
