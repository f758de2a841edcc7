"""What a page can do, added when the pages are finished: quizzes, models in the page, previews.

All of it is data and marks in the page; the scripts that use them are `_static/book.js` (every page) and
`_static/try.js` (pages with a model). A page works without either: quizzes fold open, stored text stands
in.
"""

import json
import re
from pathlib import Path

import model
import vendor
from sphinx.util import logging

from companion.local.weights import WeightsError

logger = logging.getLogger(__name__)
STORED = Path(__file__).parent.parent / "stored.json"
NEEDS = {"explorer": "explorer", "tokenizer": "tokens", "chat": "chat", "attention": "attention"}
QUESTION = re.compile(r"\d+\.\s")


def quizzes(soup):
    """Group each question with its options: a bold paragraph, and the folds that follow it."""
    number = 0
    for start in soup.select("p > strong:first-child"):
        question = start.parent
        options = []
        following = question.find_next_sibling()
        while following is not None and following.name == "details" and following.summary:
            options.append(following)
            following = following.find_next_sibling()
        if not QUESTION.match(start.get_text()) or len(options) < 2:
            continue
        number += 1
        quiz = soup.new_tag(
            "div", attrs={"class": "quiz", "role": "group", "aria-labelledby": f"quiz-{number}"}
        )
        question.insert_before(quiz)
        question["id"] = f"quiz-{number}"
        question["class"] = "quiz-question"
        quiz.append(question.extract())
        for option in options:
            option["class"] = ["quiz-option", *option.get("class", [])]
            right = "right" in option["class"]
            mark = soup.new_tag("span", attrs={"class": "quiz-mark"})
            mark.string = "Right" if right else "Not this one"
            feedback = soup.new_tag("div", attrs={"class": "quiz-feedback"})
            for part in list(option.children):
                if part is not option.summary:
                    feedback.append(part.extract())
            feedback.insert(0, mark)
            option.append(feedback)
            quiz.append(option.extract())
    return number


def embed(pages, out):
    """Give each page with a component its stored runs and the script; put the model beside the book."""
    used = {
        page: {root["data-try"] for root in soup.select(".try[data-try]")} for page, soup in pages.items()
    }
    if not any(used.values()):
        return
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    static = out / "_static"
    vendor.copy("@wllama/wllama", static)
    vendor.copy("gpt-tokenizer", static)
    models = {}
    try:
        models = model.place(static / "model")
    except (WeightsError, OSError) as error:
        logger.info("the pages show stored runs only: %s", error)
    for page, names in used.items():
        if not names:
            continue
        soup = pages[page]
        if unknown := names - NEEDS.keys():
            logger.warning(
                "%s: there is no component %s", page.name, ", ".join(sorted(unknown)), type="pages"
            )
        data = {NEEDS[name]: stored[NEEDS[name]] for name in sorted(names & NEEDS.keys())} | {
            "models": models
        }
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
        holder = soup.new_tag("script", attrs={"type": "application/json", "id": "stored"})
        holder.string = text
        soup.body.append(holder)
        soup.head.append(soup.new_tag("script", attrs={"src": "_static/try.js"}))
        soup.head.append(soup.new_tag("link", attrs={"rel": "stylesheet", "href": "_static/try.css"}))


def previews(pages, out):
    """Write what a pointer over a term or a citation shows, in a script that loads from a folder, too."""
    found = {}
    for page, soup in pages.items():
        for term in soup.select("dl.glossary dt[id]"):
            if meaning := term.find_next_sibling("dd"):
                found[f"{page.name}#{term['id']}"] = " ".join(meaning.get_text().split())
        for source in soup.select("div.citation[id]"):
            for paragraph in source.select(":scope > p"):
                found[f"{page.name}#{source['id']}"] = " ".join(paragraph.get_text().split())
    text = json.dumps(found, ensure_ascii=False, sort_keys=True)
    (out / "_static" / "previews.js").write_text(f"window.bookPreviews = {text};\n", encoding="utf-8")
