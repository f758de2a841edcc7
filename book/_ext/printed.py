"""The whole book as a PDF: one page is made of all pages, and a Chromium prints it.

Links between pages become links within the PDF. What folds is open, what needs a script is left out.
"""

import copy
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup

NAME = "gpt-at-work.pdf"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
LEFT_OUT = (
    ".headerlink, .try, .book-progress, .copybtn, .cover a, script, .toctree-wrapper, details.hide, noscript"
)
STYLE = """
@page {
  size: A4; margin: 20mm 18mm 22mm;
  @bottom-center { content: counter(page); font: 9pt sans-serif; color: #555; }
}
@page :first { margin: 0; @bottom-center { content: none; } }
html, body { display: block; background: #fff !important; font-size: 11pt; }
.printed, .printed > * { display: block; min-width: 0; max-width: 100%; padding: 0; }
.printed :is(div.output, figure, table) { max-width: 100%; overflow-wrap: anywhere; }
.printed img { max-width: 100%; height: auto; }
.printed > article { break-before: page; }
.printed .cover { break-after: page; height: 296mm; margin: 0; padding: 40mm 25mm 0; border-radius: 0; }
.printed .cover, .printed .objectives, .printed .quiz-option { print-color-adjust: exact; }
.printed .cover h1 { font: 600 44pt var(--book-serif); color: #f7f3e6; }
.printed .cover p { font: 16pt/1.4 var(--book-serif); color: #dfeadf; }
.printed .cover-art { margin: 30mm -25mm 0; }
.printed .contents { padding: 0; border: 0; background: none; box-shadow: none; }
.printed .contents a { display: block; margin: 0.3em 0; }
.printed .contents p { margin: 1em 0 0.2em; font-weight: 600; }
.printed pre { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.printed table { font-size: 9pt; }
.printed .admonition { float: none; width: auto; max-width: none; margin: 1em 0; }
.printed .sd-container-fluid, .printed .sd-row { display: block; margin: 0; padding: 0; }
.printed .sd-col { width: auto; max-width: none; margin: 0 0 4mm; padding: 0; }
"""


class PrintError(RuntimeError):
    """Why there is no PDF, in one line."""


def browser() -> str:
    """The program of a Chromium: `CHROME`, or the first that is found."""
    if named := os.environ.get("CHROME"):
        return named
    mac = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    found = next(
        (path for name in PROGRAMS if (path := shutil.which(name))), mac if Path(mac).exists() else None
    )
    if found is None:
        raise PrintError(
            "the PDF needs Chromium, and none is found: install it (apt-get install chromium), or set CHROME "
            "to the program of a browser of its kind"
        )
    return found


def print_book(html: Path) -> Path:
    """Write the PDF of the built book in the folder `html` into it, and return its path."""
    program = browser()
    page = html / "printed.html"
    page.write_text(joined(html), encoding="utf-8")
    target = html / NAME
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless=new", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
        flags += ["--generate-pdf-document-outline", "--virtual-time-budget=20000"]
        flags += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        run = subprocess.run(
            [program, *flags, f"--print-to-pdf={target}", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=600,
        )
    page.unlink()
    if run.returncode or not target.is_file():
        said = [line for line in run.stderr.splitlines() if line.strip()] or ["it wrote nothing"]
        raise PrintError(f"{program} could not print the book: {said[-1].strip()}")
    return target


def joined(html: Path) -> str:
    """All pages of the table of contents as one."""
    first = read(html / "index.html")
    links = first.select("nav.bd-links a.reference.internal")
    names = ["index.html", *dict.fromkeys(link["href"] for link in links if link["href"].endswith(".html"))]
    head = first.head
    for extra in head.select("script, link[rel=preload]"):
        extra.decompose()
    style = first.new_tag("style")
    style.string = STYLE
    head.append(style)
    body = BeautifulSoup('<body><main class="printed"></main></body>', "html.parser")
    main = body.main
    for name in dict.fromkeys(names):
        article = copy.copy(read(html / name).select_one("article.bd-article"))
        for part in article.select(LEFT_OUT):
            part.decompose()
        for fold in article.select("details"):
            fold["open"] = ""
        for element in article.select("[id]"):
            element["id"] = inside(name, element["id"])
        for link in article.select("a[href]"):
            file, _, anchor = link["href"].partition("#")
            if (file or name) in names:
                link["href"] = "#" + inside(file or name, unquote(anchor))
        article["id"] = inside(name, "")
        if name == "index.html":
            main.append(article.select_one(".cover").extract())
            main.append(contents(first))
        main.append(article)
    first.body.replace_with(body.body)
    first.html["data-theme"] = "light"
    return str(first)


def contents(soup):
    """The table of contents, with its parts."""
    box = soup.new_tag("nav", attrs={"class": "contents bd-article"})
    heading = soup.new_tag("h1")
    heading.string = "Contents"
    box.append(heading)
    for element in soup.select("nav.bd-links p.caption, nav.bd-links a.reference.internal"):
        new = soup.new_tag(element.name)
        new.string = " ".join(element.get_text().split())
        if element.name == "a":
            new["href"] = "#" + inside(element["href"], "")
        box.append(new)
    return box


def inside(name: str, anchor: str) -> str:
    return f"{name.removesuffix('.html')}--{anchor}"


def read(file: Path):
    return BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser")
