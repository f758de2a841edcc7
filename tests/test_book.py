"""The built book: every page stands on its own, and the build refuses what would break it."""

import base64
import io
import json
import re
import shutil
import sys
import tempfile
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from fontTools.ttLib import TTFont
from PIL import Image

ROOT = Path(__file__).parent.parent
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
CHAPTERS = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
PAGES = [TOC["root"], *CHAPTERS]

LOADING_RELATIONS = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch"}
LOADING_ATTRIBUTES = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
    "use": "href",
}

every_page = pytest.mark.parametrize("page", [*PAGES, "search"])
every_authored_page = pytest.mark.parametrize("page", PAGES)


def build_module(root=ROOT):
    """The module book/build.py of a checkout, which is a script and not part of the package."""
    spec = spec_from_file_location("book_build", root / "book" / "build.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    return build_module().build(tmp_path_factory.mktemp("book") / "html")


@pytest.fixture
def copy(tmp_path):
    """The book's configuration with four short pages in place of the chapters, which a test may spoil."""
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "book", tmp_path / "copy" / "book", ignore=ignored)
    chapters = tmp_path / "copy" / "chapters"
    chapters.mkdir()
    for name in ("index", "installation", "about"):
        (chapters / f"{name}.md").write_text(f"# The page {name}\n\nIts first paragraph.\n", "utf-8")
    cells = [
        nbformat.v4.new_markdown_cell("# A chapter\n\nIts first paragraph."),
        nbformat.v4.new_code_cell("1 + 1"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel | {"language_info": {"name": "python"}})
    nbformat.write(notebook, chapters / "01_what_is_chatgpt.ipynb")
    files = [{"file": name} for name in ("installation", "01_what_is_chatgpt", "about")]
    contents = {"format": "jb-book", "root": "index", "parts": [{"caption": "Pages", "chapters": files}]}
    (tmp_path / "copy" / "book" / "_toc.yml").write_text(yaml.safe_dump(contents), "utf-8")
    return tmp_path / "copy"


def read(file):
    return BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(file):
    return {element["id"] for element in read(file).select("[id]")}


def addresses_loaded(soup):
    """Every address that a browser fetches for the page by itself."""
    for tag, attribute in LOADING_ATTRIBUTES.items():
        for element in soup.select(f"{tag}[{attribute}]"):
            yield element[attribute]
    for element in soup.select("[srcset]"):
        yield from (candidate.split()[0] for candidate in element["srcset"].split(","))
    for link in soup.select("link[href]"):
        if LOADING_RELATIONS & set(link.get("rel", [])):
            yield link["href"]
    for style in soup.select("style"):
        yield from style_addresses(style.get_text())
    for element in soup.select("[style]"):
        yield from style_addresses(element["style"])


def style_addresses(text):
    """The addresses in a style sheet: url(…) and @import."""
    for match in re.finditer(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", text):
        yield match[1] or match[2]


def is_elsewhere(address):
    parts = urlsplit(address)
    return bool(parts.netloc or parts.scheme) and parts.scheme != "data"


def test_every_chapter_notebook_is_in_the_table_of_contents():
    notebooks = {file.stem for file in (ROOT / "chapters").glob("*.ipynb")}
    assert notebooks, "chapters/ holds no notebook"
    assert notebooks <= set(CHAPTERS)


def test_build_keeps_a_folder_that_is_not_an_earlier_build(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    module = build_module()
    with pytest.raises(module.BuildError, match="not empty and is not an earlier build"):
        module.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("folder", [".", "chapters", "chapters/_build", "book/html"])
def test_build_refuses_the_folders_of_its_sources(folder):
    module = build_module()
    with pytest.raises(module.BuildError, match="sources"):
        module.build(ROOT / folder)


def test_build_refuses_a_file_as_its_target(tmp_path):
    (tmp_path / "out").write_text("a file")
    module = build_module()
    with pytest.raises(module.BuildError, match="is a file"):
        module.build(tmp_path / "out")


@pytest.mark.slow
def test_build_replaces_an_earlier_build_and_leaves_nothing_else_behind(copy, tmp_path):
    out = tmp_path / "out" / "html"
    module = build_module(copy)
    module.build(out)
    (out / "stale.html").write_text("from an older table of contents")
    assert module.build(out) == out
    assert (out / "index.html").is_file()
    assert not (out / "stale.html").exists()
    assert [file.name for file in out.parent.iterdir()] == ["html"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("See [this](nowhere.md).", "nowhere"),
        ("See [this](installation.md#no-such-section).", "no-such-section"),
        ("So they say {cite:p}`nobody1900`.", "nobody1900"),
        ("![A picture](https://example.org/picture.png)", "example.org/picture.png from another site"),
        ("![A picture](picture.png)", "picture.png"),
        ("$$ e^{x $$", "e^{x cannot be set"),
    ],
    ids=["page", "anchor", "citation", "remote image", "missing image", "mathematics"],
)
def test_build_fails_on_what_would_be_broken_and_keeps_the_earlier_build(
    copy, tmp_path, monkeypatch, text, complaint
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    earlier = tmp_path / "html"
    earlier.mkdir()
    module = build_module(copy)
    (earlier / module.MARKER).touch()
    (earlier / "index.html").write_text("the earlier build")
    page = copy / "chapters" / "about.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{text}\n", encoding="utf-8")
    with pytest.raises(module.BuildError, match=re.escape(complaint)) as error:
        module.build(earlier)
    assert "\n" not in str(error.value)
    assert (earlier / "index.html").read_text() == "the earlier build"


@pytest.mark.slow
def test_formulas_are_set_at_build_and_carried_as_text_for_screen_readers(copy, tmp_path):
    page = copy / "chapters" / "about.md"
    page.write_text(
        page.read_text("utf-8") + "\nThe odds $e^{x}$ and\n\n$$ \\frac{a}{b} $$ (eq-odds)\n", "utf-8"
    )
    html = build_module(copy).build(tmp_path / "html")
    about, other = read(html / "about.html"), read(html / "installation.html")
    inline, display = about.select(".katex")
    assert inline.select_one("annotation").get_text() == "e^{x}"
    assert display.select_one("math mfrac") and about.select_one(".eqno").get_text().startswith("(1)")
    assert about.select_one('link[href*="katex"]') and not other.select_one('link[href*="katex"]')
    assert not [script for script in about.select("script") if "mathjax" in str(script).lower()]
    style = html / "_static" / "math" / "katex.min.css"
    fonts = {f for f in style_addresses(style.read_text("utf-8")) if f.endswith("woff2")}
    assert fonts and all((style.parent / font).is_file() for font in fonts)
    letters = TTFont(style.parent / "fonts" / "KaTeX_Math-Italic.woff2").getBestCmap()
    shown = {
        letter
        for page in html.glob("*.html")
        for part in read(page).select(".katex-html")
        for letter in part.text
    }
    assert {ord("x"), ord("a")} <= letters.keys() <= set(map(ord, shown))


@pytest.mark.slow
def test_percentages_do_not_break_and_code_keeps_its_own(copy, tmp_path):
    page = copy / "chapters" / "about.md"
    options = "".join(f"<details><summary>{share} % do.</summary>\n\nNo.\n\n</details>\n" for share in (3, 4))
    text = f"From 1% to 2 %, `5 %`, %a, $6\\%$.\n\n    x = 7 % 8\n\n**1. Who?**\n\n{options}"
    page.write_text(page.read_text("utf-8") + "\n" + text, "utf-8")
    file = copy / "chapters" / "01_what_is_chatgpt.ipynb"
    notebook = nbformat.read(file, 4)
    about = {"scrapbook": {"name": "share", "mime_prefix": "application/papermill.record/"}}
    data = {"application/papermill.record/text/plain": "'9%'"}
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("stream", text="10 %"),
        nbformat.v4.new_output("display_data", data, metadata=about),
    ]
    notebook.cells.append(nbformat.v4.new_markdown_cell("Glued: {glue:text}`share`."))
    nbformat.write(notebook, file)
    html = build_module(copy).build(tmp_path / "html")
    article = read(html / "about.html").select_one("article").get_text()
    assert "From 1\N{NO-BREAK SPACE}% to 2\N{NO-BREAK SPACE}%, 5 %, %a," in article
    assert "x = 7 % 8" in article and "3\N{NO-BREAK SPACE}% do." in article
    article = read(html / "01_what_is_chatgpt.html").select_one("article").get_text()
    assert "Glued: 9\N{NO-BREAK SPACE}%." in article and "10 %" in article


@pytest.mark.slow
def test_a_figure_on_the_page_has_the_pixels_of_the_notebook(book):
    cells = nbformat.read(ROOT / "chapters" / "01_what_is_chatgpt.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    stored = [
        base64.b64decode(one.data["image/png"]) for one in outputs if "image/png" in one.get("data", {})
    ]
    images = read(book / "01_what_is_chatgpt.html").select("article figure img")
    shown = [(book / image["src"]).read_bytes() for image in images]
    assert len(shown) == len(stored) >= 3

    def pixels(picture):
        return Image.open(io.BytesIO(picture)).convert("RGBA").tobytes()

    for before, after in zip(stored, shown, strict=True):
        assert pixels(before) == pixels(after)
        assert len(after) < 0.7 * len(before)


@pytest.mark.slow
def test_each_quiz_question_has_options_one_of_them_right_and_a_reason_for_each(book):
    found = 0
    for page in CHAPTERS:
        for quiz in read(book / f"{page}.html").select(".quiz"):
            options = quiz.select(".quiz-option")
            where = f"{page}: {quiz.select_one('.quiz-question').get_text()}"
            assert 3 <= len(options) <= 4, where
            assert sum("right" in option["class"] for option in options) == 1, where
            assert all(len(option.select_one(".quiz-feedback p").get_text()) > 20 for option in options), (
                where
            )
            found += 1
    assert found >= 25


@pytest.mark.slow
def test_with_its_addresses_the_book_has_buttons_a_sitemap_and_a_card(copy, tmp_path):
    publish = load("publish", copy / "book" / "publish.py")
    assert publish.publish("https://github.com/you/course", copy) == len(
        list((copy / "chapters").glob("*.ipynb"))
    )
    config = copy / "book" / "_config.yml"
    text = config.read_text("utf-8")
    config.write_text(text.replace('html_baseurl: ""', 'html_baseurl: "https://you.example/book"'), "utf-8")
    html = build_module(copy).build(tmp_path / "html")
    chapter = read(html / "01_what_is_chatgpt.html")
    links = [link["href"] for link in chapter.select("a[href]")]
    path = "you/course"
    assert any(link.startswith("https://mybinder.org/v2/gh/" + path) for link in links)
    assert any(link.startswith("https://colab.research.google.com/github/" + path) for link in links)
    assert "find_spec" not in chapter.select_one("article").get_text()
    assert "<loc>https://you.example/book/01_what_is_chatgpt.html</loc>" in (html / "sitemap.xml").read_text()
    card = chapter.select_one('meta[property="og:image"]')["content"]
    assert (
        card.startswith("https://you.example/book/")
        and (html / urlsplit(card).path.removeprefix("/book/")).is_file()
    )


def test_publishing_writes_a_first_cell_that_installs_and_takes_it_away_again(copy):
    publish = load("publish", copy / "book" / "publish.py")
    before = {file: file.read_text("utf-8") for file in (copy / "chapters").glob("*.ipynb")}
    publish.publish("https://github.com/you/course", copy)
    for file in before:
        first = json.loads(file.read_text("utf-8"))["cells"][0]
        code = "".join(first["source"])
        assert "git clone -q --depth 1 --branch main https://github.com/you/course course" in code
        assert code.endswith("%cd -q course/chapters")
        assert {"remove-cell", "nbval-skip"} <= set(first["metadata"]["tags"])
    publish.publish("", copy)
    assert {file: json.loads(file.read_text("utf-8")) for file in before} == {
        file: json.loads(text) for file, text in before.items()
    }
    for address in (
        "github.com",
        "https://github.com/you",
        "https://me@git.example/you/course",
        "https://a/b/c; ls",
    ):
        with pytest.raises(ValueError, match="not a repository's address"):
            publish.publish(address, copy)


@pytest.mark.slow
def test_without_an_address_no_page_offers_a_launch(book):
    links = [link["href"] for page in PAGES for link in read(book / f"{page}.html").select("a[href]")]
    assert not [link for link in links if "mybinder.org/v2" in link or "colab.research" in link]


def test_an_adapter_is_added_to_the_weights_of_the_model_for_the_page(tmp_path):
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    model = load("page_model", ROOT / "book" / "_ext" / "model.py")
    random = np.random.default_rng(1)
    kept, changed = random.normal(size=(4, 32)).astype("f4"), random.normal(size=(4, 32)).astype("f4")
    a, b = random.normal(size=(2, 32)).astype("f2"), random.normal(size=(4, 2)).astype("f2")
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["one", "two"])
    for name, data in (("kept.weight", kept), ("changed.weight", changed)):
        small = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, small, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    finish(writer)
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_tensor("changed.weight.lora_a", a)
    writer.add_tensor("changed.weight.lora_b", b)
    finish(writer)
    model.merge(tmp_path / "base.gguf", tmp_path / "adapter.gguf", tmp_path / "out.gguf")
    base, out = gguf.GGUFReader(tmp_path / "base.gguf"), gguf.GGUFReader(tmp_path / "out.gguf")
    assert out.fields["tokenizer.ggml.tokens"].contents() == ["one", "two"]
    whole = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in [*base.tensors]}
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in out.tensors}
    assert (found["kept.weight"] == whole["kept.weight"]).all()
    expected = whole["changed.weight"] + 2.0 * (b.astype("f4") @ a.astype("f4"))
    assert np.abs(found["changed.weight"] - expected).max() < np.abs(expected).max() / 100


@pytest.mark.parametrize(
    ("selector", "kept"),
    [
        (".only-dark img", True),
        ("html[data-theme=dark] .only-dark~p:not(.absent)", True),
        (":is(.absent,.only-dark) p", True),
        ("#place > p::before", True),
        (".only-dark .absent", False),
        ("#absent", False),
        ("video", False),
        (r".d-sm\:none", False),
    ],
)
def test_a_style_rule_is_left_out_only_if_nothing_can_match_it(selector, kept):
    slim = load("page_slim", ROOT / "book" / "_ext" / "slim.py")
    assert slim.may_match(selector, {"only-dark", "place"}, {"html", "p", "img"}) is kept


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(name, file):
    spec = spec_from_file_location(name, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vendored(tmp_path, monkeypatch):
    """book/_ext/vendor.py with a home of its own, which holds nothing yet."""
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path / "home"))
    return load("book_vendor", ROOT / "book" / "_ext" / "vendor.py")


def test_what_is_altered_on_the_disk_is_fetched_again_and_never_used(vendored, tmp_path, monkeypatch):
    entry = vendored.LOCK["katex"]
    file = tmp_path / "home" / "vendor" / f"katex-{entry['version']}.tgz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    monkeypatch.setattr(
        vendored, "node", lambda program: [sys.executable, "-c", "raise SystemExit('no network')"]
    )
    with pytest.raises(
        vendored.VendorError, match=r"katex@.* could not be fetched .no network.*copy"
    ) as error:
        vendored.archive("katex")
    assert "\n" not in str(error.value)


def test_an_archive_that_is_not_the_one_in_the_lockfile_is_refused(vendored, monkeypatch):
    other = "open('katex.tgz', 'wb').write(b'another archive')"
    monkeypatch.setattr(vendored, "node", lambda program: [sys.executable, "-c", other])
    with pytest.raises(vendored.VendorError, match="altered"):
        vendored.archive("katex")


def test_every_package_in_the_lockfile_has_a_version_a_licence_and_a_checksum(vendored):
    assert vendored.LOCK
    for name, entry in vendored.LOCK.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", entry["version"]), name
        assert entry["license"] in {"MIT", "OFL-1.1", "BSD-3-Clause", "MPL-2.0"}, name
        assert re.fullmatch(r"sha512-[A-Za-z0-9+/]{86}==", entry["integrity"]), name


@pytest.mark.slow
@every_page
def test_internal_links_lead_to_a_file_and_to_an_anchor_in_it(book, page):
    file = book / f"{page}.html"
    links = [link["href"] for link in read(file).select("a[href]") if not is_elsewhere(link["href"])]
    assert links
    broken = []
    for link in links:
        path, _, fragment = link.partition("#")
        target = (file.parent / unquote(path)).resolve() if path else file
        if not target.is_file() or (fragment and unquote(fragment) not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.slow
@every_page
def test_page_loads_only_files_of_the_book(book, page):
    file = book / f"{page}.html"
    addresses = set(addresses_loaded(read(file)))
    assert addresses
    assert not {address for address in addresses if is_elsewhere(address)}
    local = {urlsplit(address).path for address in addresses if not address.startswith(("data:", "#"))}
    assert not {path for path in local if not (file.parent / unquote(path)).is_file()}


@pytest.mark.slow
def test_style_sheets_load_nothing_from_elsewhere(book):
    sheets = list(book.rglob("*.css"))
    assert sheets
    elsewhere = {a for sheet in sheets for a in style_addresses(sheet.read_text("utf-8")) if is_elsewhere(a)}
    assert not elsewhere


@pytest.mark.slow
@every_page
def test_no_script_names_thebe_or_is_declared_twice(book, page):
    scripts = read(book / f"{page}.html").select("script")
    codes = [script.get("src") or script.get_text() for script in scripts]
    assert codes
    assert not [code for code in codes if "thebe" in code.lower()]
    assert len(codes) == len(set(codes))


@pytest.mark.slow
@every_page
def test_every_image_says_what_it_shows(book, page):
    images = read(book / f"{page}.html").select("img")
    assert images
    file_name = re.compile(r"[/\\]|\.(png|jpe?g|svg|gif|webp)$", re.IGNORECASE)
    texts = {image["src"]: image.get("alt", "").strip() for image in images}
    assert not [source for source, text in texts.items() if not text or file_name.search(text)]


@pytest.mark.slow
@every_page
def test_page_has_a_title_a_description_a_language_and_one_heading(book, page):
    soup = read(book / f"{page}.html")
    assert soup.html["lang"] == "en"
    assert soup.title.get_text(strip=True)
    descriptions = soup.select('meta[name="description"]')
    assert [bool(description["content"].strip()) for description in descriptions] == [True]
    headings = [heading.get_text(strip=True) for heading in soup.select("h1")]
    assert len(headings) == 1 and headings[0]
    assert len(soup.select("main")) == 1


@pytest.mark.slow
def test_no_two_pages_share_a_title_or_a_description(book):
    soups = [read(book / f"{page}.html") for page in PAGES]
    assert len({soup.title.get_text() for soup in soups}) == len(PAGES)
    assert len({soup.select_one('meta[name="description"]')["content"] for soup in soups}) == len(PAGES)


@pytest.mark.slow
@every_authored_page
def test_no_page_shows_an_error_or_an_unresolved_role(book, page):
    article = read(book / f"{page}.html").select_one("article.bd-article")
    assert article.get_text(strip=True)
    assert not article.select(".problematic, .system-message, .pending-xref")
    assert not re.search(r"\{(cite|term|doc|ref|numref|glue|eval)(:\w+)?\}`", article.get_text())
