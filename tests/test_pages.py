"""The built book in a real browser: every page opens and asks nobody else, and what can be used works."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import pytest
from test_book import PAGES, ROOT, book  # noqa: F401  (book is a fixture)

from companion.cli import page_server
from companion.local import weights

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import printed
import vendor

pytestmark = pytest.mark.slow
STORED = json.loads((ROOT / "book" / "stored.json").read_text(encoding="utf-8"))
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# No name but this machine's has an address in this browser.
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
EXPLORER, CHAT, TOKENS = ".try[data-try=explorer]", ".try[data-try=chat]", ".try[data-try=tokenizer]"
ATTENTION = ".try[data-try=attention]"

every_page = pytest.mark.parametrize("page", [*PAGES, "search"])


def missing(why):
    """Skip, or fail where this machine was set up to have a browser."""
    if os.environ.get("COMPANION_NEEDS_BROWSER"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("NO BROWSER TESTS: playwright is not installed: pip install -e '.[test]'")
    try:
        program = printed.browser()
    except printed.PrintError:
        missing("NO BROWSER TESTS: no Chromium is found: install it, or set CHROME to its program")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", ALONE])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address(book):  # noqa: F811
    server = page_server(book)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def shared(chromium):
    """A context for each kind of screen, for the tests that leave nothing behind in it."""

    @functools.cache
    def context(width, height, theme):
        viewport = {"width": width, "height": height}
        return chromium.new_context(viewport=viewport, color_scheme=theme, reduced_motion="reduce")

    return context


@pytest.fixture
def window(chromium, shared):
    """Opens pages; afterwards nothing may have gone wrong or elsewhere in any of them."""
    opened, complaints = [], []

    def open_page(url, *, viewport=DESKTOP, theme="light", fresh=True, **options):
        if fresh:
            options |= {"viewport": viewport, "color_scheme": theme, "reduced_motion": "reduce"}
            context = chromium.new_context(**options)
        else:
            context = shared(viewport["width"], viewport["height"], theme)
        page = context.new_page()
        opened.append(context if fresh else page)
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: is_elsewhere(request.url) and complaints.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for one in opened:
        one.close()
    assert not complaints


def is_elsewhere(url):
    return not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:", "about:"))


def violations(page):
    page.evaluate(vendor.read("axe-core", "axe.min.js").decode("utf-8"))
    found = page.evaluate(f"axe.run(document, {{runOnly: {json.dumps(RULES)}, resultTypes: ['violations']}})")
    return [f"{one['id']}: {node['target']}" for one in found["violations"] for node in one["nodes"]]


def is_too_wide(page):
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


@every_page
def test_page_by_day_on_a_desk_and_by_night_on_a_phone_is_accessible_and_asks_nobody(window, address, page):
    for viewport, theme in ((DESKTOP, "light"), (PHONE, "dark")):
        opened = window(f"{address}/{page}.html", viewport=viewport, theme=theme, fresh=False)
        assert opened.evaluate("document.documentElement.dataset.theme") == theme
        opened.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        assert not is_too_wide(opened)
        assert violations(opened) == []


@every_page
def test_page_from_a_folder_by_night_on_a_desk_and_by_day_on_a_phone_asks_nobody(window, book, page):  # noqa: F811
    for viewport, theme in ((DESKTOP, "dark"), (PHONE, "light")):
        opened = window((book / f"{page}.html").as_uri(), viewport=viewport, theme=theme, fresh=False)
        assert opened.locator("main").inner_text().strip()
        assert not is_too_wide(opened)


@pytest.mark.parametrize("where", ["folder", "server"])
def test_search_finds_a_word_from_a_folder_and_from_a_server(window, address, book, where):  # noqa: F811
    base = address if where == "server" else book.as_uri()
    page = window(f"{base}/search.html?q=temperature")
    page.wait_for_selector("#search-results ul.search li a")
    assert any(
        "01_what_is_chatgpt" in link.get_attribute("href") for link in page.locator("ul.search a").all()
    )


def test_a_quiz_is_answered_by_keyboard_gives_its_reason_and_is_remembered(window, address):
    page = window(f"{address}/01_what_is_chatgpt.html")
    quiz = page.locator(".quiz").first
    wrong, right = quiz.locator(".quiz-option:not(.right)").first, quiz.locator(".quiz-option.right")
    for option, mark in ((wrong, "Not this one"), (right, "Right")):
        assert not option.locator(".quiz-feedback").is_visible()
        option.locator("summary").focus()
        page.keyboard.press("Enter")
        assert option.locator(".quiz-feedback p").first.is_visible()
        assert option.locator(".quiz-mark").inner_text() == mark
    assert page.locator(".quiz-score").inner_text() == "1 of 5 answered, 0 right at once."
    page.reload()
    assert right.locator(".quiz-feedback p").first.is_visible()
    page.click(".quiz-again")
    assert not right.locator(".quiz-feedback p").first.is_visible()
    assert not page.locator(".quiz-foot").is_visible()


def test_a_quiz_works_without_scripts(window, address):
    page = window(f"{address}/01_what_is_chatgpt.html", java_script_enabled=False)
    option = page.locator(".quiz-option.right").first
    option.locator("summary").click()
    assert option.locator(".quiz-feedback p").first.is_visible()


def test_what_was_read_is_marked_until_the_reader_has_it_forgotten(window, address):
    page = window(f"{address}/about.html")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_selector(".bd-links .book-read", state="attached")
    page.goto(f"{address}/index.html")
    assert "1 page read" in page.locator(".book-progress").inner_text()
    page.click(".book-progress button")
    page.reload()
    assert page.locator(".book-progress").inner_text() == "" and page.locator(".book-read").count() == 0


def test_a_citation_and_a_term_show_their_line_at_the_focus_and_escape_hides_it(window, address):
    page = window(f"{address}/01_what_is_chatgpt.html")
    page.locator('article a[href*="bibliography.html#"]').first.focus()
    page.wait_for_selector(".book-preview:not([hidden])")
    assert "SmolLM2" in page.locator(".book-preview").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator(".book-preview").is_visible()
    page.goto(f"{address}/playground.html")
    page.locator('article a[href*="glossary.html#term"]').first.hover()
    page.wait_for_selector(".book-preview:not([hidden])")
    assert "token" in page.locator(".book-preview").inner_text().lower()


def test_the_theme_changes_by_a_click_and_charts_follow(window, address):
    page = window(f"{address}/03_pretraining.html")
    chart = page.locator("article .cell_output img").first
    by_day = chart.evaluate("(chart) => getComputedStyle(chart).filter")
    while page.evaluate("document.documentElement.dataset.theme") != "dark":
        page.locator("button.theme-switch-button:visible").click()
    assert by_day == "none" and "invert" in chart.evaluate("(chart) => getComputedStyle(chart).filter")


def test_code_is_copied_by_a_click(window, address):
    page = window(f"{address}/01_what_is_chatgpt.html", permissions=["clipboard-read", "clipboard-write"])
    page.locator("div.highlight").first.hover()
    page.locator("button.copybtn").first.click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("import companion")


@pytest.mark.parametrize("where", ["folder", "server"])
def test_the_explorer_shows_stored_runs_before_a_model_is_there(window, address, book, where):  # noqa: F811
    page = window(f"{address if where == 'server' else book.as_uri()}/playground.html")
    root = page.locator(EXPLORER)
    beginning = STORED["explorer"]["beginnings"][0]
    rows, text = root.locator(".try-candidates button"), root.locator("textarea")
    assert rows.first.locator("code").inner_text() == beginning["tokens"][0][0].replace(" ", "·")
    assert shares(root)[0] == pytest.approx(2.718281828 ** beginning["tokens"][0][1], abs=0.006)
    at_one = shares(root)[0]
    root.get_by_label("Temperature").fill("2")
    assert shares(root)[0] < at_one
    root.get_by_label("Temperature").fill("0.25")
    assert shares(root)[0] > at_one
    root.get_by_label("Top-p").fill("0.1")
    assert shares(root)[:2] == [1, 0]
    root.get_by_role("button", name="Draw a token").click()
    assert text.input_value() == beginning["text"] + beginning["tokens"][0][0]
    root.get_by_role("button", name="Take back").click()
    assert text.input_value() == beginning["text"]
    text.fill("Nobody stored this")
    page.wait_for_function(
        f"document.querySelector('{EXPLORER} .try-said').textContent.includes('no stored run')"
    )
    assert (page.locator(".try-load:visible").count() > 1) == (where == "server")


def shares(root):
    return [float(one.inner_text().rstrip(" %")) / 100 for one in root.locator(".try-percent").all()]


def test_a_text_of_ones_own_is_cut_by_openais_vocabulary_from_a_folder(window, book):  # noqa: F811
    root = window((book / "playground.html").as_uri()).locator(TOKENS)
    stored = STORED["tokens"][0]
    assert root.locator(".try-smollm2 li").count() == len(stored["smollm2"])
    root.locator(".try-openai .try-load").click()
    root.locator("textarea").fill("hello world, hello")
    root.page.wait_for_function(f"document.querySelectorAll('{TOKENS} .try-openai li').length === 4")
    assert root.locator(".try-openai li").all_inner_texts() == ["hello", "·world", ",", "·hello"]
    assert "Run the model" in root.locator(".try-smollm2 .try-count").inner_text()


def test_the_chat_shows_stored_replies_and_says_so(window, address):
    root = window(f"{address}/playground.html").locator(CHAT)
    stored = STORED["chat"][0]
    root.locator("select").select_option("0")
    root.get_by_role("button", name="Send to both").click()
    assert root.locator(".try-bubble.try-tuned p").last.inner_text() == stored["tuned"]
    assert root.locator(".try-bubble.try-base p").last.inner_text() == stored["base"].rstrip()
    assert "stored" in root.locator(".try-said").inner_text()
    root.get_by_role("button", name="Start again").click()
    assert root.locator(".try-bubble").count() == 0


def test_attention_follows_the_token_the_layer_and_the_head(window, address):
    root = window(f"{address}/playground.html").locator(ATTENTION)
    seen = {root.locator(".try-said").inner_text()}
    tokens = root.locator(".try-attention button")
    tokens.nth(10).focus()
    root.page.keyboard.press("Enter")
    assert tokens.nth(10).get_attribute("aria-pressed") == "true"
    seen.add(root.locator(".try-said").inner_text())
    root.get_by_label("Layer").fill("3")
    seen.add(root.locator(".try-said").inner_text())
    root.get_by_label("Head", exact=True).select_option("4")
    seen.add(root.locator(".try-said").inner_text())
    assert len(seen) == 4
    first = STORED["attention"]["tokens"][0]
    root.get_by_label("count the first token").check()
    assert f"{first} (" in root.locator(".try-said").inner_text()


def test_the_real_model_runs_in_the_page_and_is_kept_by_the_browser(window, address):
    page = window(f"{address}/playground.html")
    root = page.locator(EXPLORER)
    root.locator(".try-load").click()
    page.wait_for_selector(f"{EXPLORER}[data-source=model]", timeout=120_000)
    beginning = STORED["explorer"]["beginnings"][0]
    likely = [token.replace(" ", "·") for token, _ in beginning["tokens"][:2]]
    assert root.locator(".try-candidates code").all_inner_texts()[:2] == likely
    assert shares(root)[0] == pytest.approx(2.718281828 ** beginning["tokens"][0][1], abs=0.1)
    root.locator("textarea").fill("The capital of Italy is")
    page.wait_for_function(
        f"document.querySelector('{EXPLORER} .try-candidates').textContent.includes('Rome')", timeout=60_000
    )
    text = STORED["tokens"][1]["text"] + "!"
    page.locator(TOKENS).locator("textarea").fill(text)
    page.wait_for_function(
        f"document.querySelectorAll('{TOKENS} .try-smollm2 li').length > 20", timeout=60_000
    )
    assert "".join(page.locator(f"{TOKENS} .try-smollm2 li").all_inner_texts()).replace("·", " ") == text
    attention = page.locator(ATTENTION)
    page.wait_for_selector(f"{ATTENTION}[data-source=model]", timeout=120_000)
    attention.locator("textarea").fill("The boots leak. I want to send them back.")
    page.wait_for_function(
        f"document.querySelector('{ATTENTION} .try-attention').textContent.includes('boots')", timeout=120_000
    )
    assert attention.locator(".try-attention button").nth(1).inner_text() == "·boots"
    assert "takes most from" in attention.locator(".try-said").inner_text()
    attention.locator("textarea").fill("word " * 60)
    page.wait_for_function(
        f"document.querySelector('{ATTENTION} .try-said').textContent.includes('are followed here')"
    )
    chat = page.locator(CHAT)
    chat.locator("textarea").fill("What is a tent?")
    chat.get_by_role("button", name="Send to both").click()
    page.wait_for_selector(f"{CHAT} .try-base[data-source=model]", timeout=120_000)
    assert len(chat.locator(".try-bubble.try-base p").last.inner_text().split()) > 3
    fetched = []
    page.on(
        "request", lambda request: request.url.split("?")[0].endswith(".part") and fetched.append(request.url)
    )
    page.reload()
    root.locator(".try-load").click()
    page.wait_for_selector(f"{EXPLORER}[data-source=model]", timeout=120_000)
    assert fetched == []


def test_the_page_computes_the_attention_weights_that_transformers_computes(tmp_path):
    """The stored weights are transformers'; the script reads the same file. They may round differently."""
    stored = STORED["attention"]
    script = tmp_path / "compare.mjs"
    (tmp_path / "attention.mjs").write_bytes((ROOT / "book" / "_static" / "attention.js").read_bytes())
    script.write_text(
        """
        import fs from "node:fs";
        import { open } from "./attention.mjs";
        const { file, tokens, weights } = JSON.parse(fs.readFileSync(0, "utf8"));
        const model = await open(new Blob([fs.readFileSync(file)]));
        const found = await model.attend(tokens, () => true);
        const wanted = Buffer.from(weights, "base64");
        if (found.length !== wanted.length) throw new Error(`${found.length} of ${wanted.length}`);
        console.log(Math.max(...wanted.map((one, i) => Math.abs(one - found[i]))));
        """
    )
    file = str(weights.path("smollm2-135m-instruct"))
    vocabulary = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    tokens = [vocabulary.index(token.replace(" ", "Ġ")) for token in stored["tokens"]]
    given = {"file": file, "tokens": tokens, "weights": stored["weights"]}
    done = subprocess.run([*vendor.node(), script], input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1  # of 255


def test_a_model_that_cannot_be_had_is_said_in_the_page(chromium, address):
    page = chromium.new_context().new_page()
    page.route("**/*.part*", lambda route: route.fulfill(status=404))
    page.goto(f"{address}/playground.html")
    page.click(f"{EXPLORER} .try-load")
    page.wait_for_function(f"document.querySelector('{EXPLORER} .try-model').textContent.includes('404')")
    assert page.locator(f"{EXPLORER} .try-load").is_visible()
    assert page.locator(f"{EXPLORER} .try-candidates button").count() == 12
    page.context.close()


def test_the_whole_book_is_printed(book, chromium):  # noqa: F811
    file = printed.print_book(book)
    data = file.read_bytes()
    file.unlink()
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", data)) > 2 * len(PAGES)
    assert not (book / "printed.html").exists()


def test_without_a_browser_there_is_one_line_instead_of_a_pdf(monkeypatch):
    monkeypatch.setenv("CHROME", "")
    monkeypatch.setattr(printed.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(printed.PrintError, match="needs Chromium"):
        printed.browser()
