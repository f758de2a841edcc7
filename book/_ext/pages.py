"""Sphinx extension: finish the HTML pages so that they stand on their own.

The theme's pages ask a CDN for a script, declare one script constant twice and leave some elements without a
name for screen readers. After the build this extension rewrites each page: nothing is fetched from elsewhere,
scripts do not hold up the page, there is one first-level heading and a description.

Formulas are set once, here, by KaTeX: the page carries them as text for every reader, needs no script for
them and loads fonts only where there are formulas. What else a page needs of others (fonts, the widgets'
script) is copied beside it by `vendor`.

Then it looks at what each page loads. An address on another site, or a file that is not there, is a warning,
and `jupyter-book build -W` turns warnings into errors.
"""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parent))
import components
import slim
import vendor

logger = logging.getLogger(__name__)

UNUSED_SCRIPTS = ("sphinx-thebe.js", "fontawesome.js", "mathjax")
UNUSED_FILES = ("sphinx-thebe.*", "scripts/fontawesome.js*", "**/*.map")
SET_FORMULAS = """
const katex = require(process.argv[1]);
const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(formulas.map(([tex, displayMode]) => {
  try { return {html: katex.renderToString(tex, {displayMode, strict: false})}; }
  catch (error) { return {problem: error.message}; }
})));
"""
UNLISTED = ("search.html", "genindex.html")
DESCRIPTIONS = {"search": "Search the whole book."}
DESCRIPTION_LENGTH = 155
NAMES = {
    "#pst-search-dialog": "Search",
    "#pst-primary-sidebar-modal, #pst-primary-sidebar": "Contents and search",
    "#pst-secondary-sidebar-modal, #pst-secondary-sidebar": "On this page",
}
CODE = "pre, code, script, style, .math, .output"
PERCENT = re.compile(r"(?<=\d)\s?%(?!\w)")
LOADED = "script[src], img[src], iframe[src], source[src], video[src], audio[src], embed[src]"


def offer_launches(app, config):
    """Where the repository's address is given, offer its notebooks on Binder and Colab."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options.setdefault("launch_buttons", {}).update(
            binderhub_url="https://mybinder.org", colab_url="https://colab.research.google.com"
        )
        options.update(use_repository_button=True, use_issues_button=True)


def describe(app, pagename, templatename, context, doctree):
    """Give the first page the whole title, and a page without an authored description its first paragraph."""
    if pagename == app.config.root_doc:
        context["title"], context["docstitle"] = app.config.project, ""
    if 'name="description"' in context.get("metatags", ""):
        return
    text = DESCRIPTIONS.get(pagename, "")
    if doctree and (paragraph := next(doctree.findall(nodes.paragraph), None)):
        text = " ".join(paragraph.astext().split())
    if len(text) > DESCRIPTION_LENGTH:
        text = text[:DESCRIPTION_LENGTH].rsplit(" ", 1)[0] + " …"
    tag = BeautifulSoup().new_tag("meta", attrs={"name": "description", "content": text})
    context["metatags"] = context.get("metatags", "") + str(tag)


def mend_links_from_elsewhere(pages, out, base):
    """What other sites and search engines show: title, description, the card, and a sitemap.

    `base` is where the book will stand (`html_baseurl` in the configuration). Without it neither the card nor
    the pages have an address that others could fetch.
    """
    for page, soup in pages.items():
        if not (description := soup.select_one('meta[name="description"]')):
            continue
        shown = {
            "og:type": "article",
            "og:site_name": "GPT at Work",
            "og:title": soup.title.get_text(strip=True),
        }
        shown["og:description"] = description["content"]
        if base:
            shown["og:url"] = f"{base}/{page.relative_to(out).as_posix()}"
            shown["og:image"] = f"{base}/_static/card.png"
        for old in soup.select('meta[property^="og:"], link[rel="canonical"]'):
            old.decompose()
        for name, content in shown.items():
            soup.head.append(soup.new_tag("meta", attrs={"property": name, "content": content}))
        soup.head.append(
            soup.new_tag("meta", attrs={"name": "twitter:card", "content": "summary_large_image"})
        )
        if base:
            soup.head.append(soup.new_tag("link", rel="canonical", href=shown["og:url"]))
    if base:
        names = [
            page.relative_to(out).as_posix()
            for page in pages
            if page.name not in ("search.html", "genindex.html")
        ]
        places = "".join(f"<url><loc>{base}/{name}</loc></url>" for name in names)
        head = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
        (out / "sitemap.xml").write_text(f"{head}{places}</urlset>\n", encoding="utf-8")
        (out / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {base}/sitemap.xml\n", "utf-8")


def finish(app, exception):
    """Rewrite every page of a successful HTML build and warn about what it could not load."""
    if exception or app.builder.format != "html":
        return
    out = Path(app.outdir)
    for pattern in UNUSED_FILES:
        for file in (out / "_static").glob(pattern):
            file.unlink()
    files = [page for page in sorted(out.rglob("*.html")) if "_static" not in page.relative_to(out).parts]
    pages = {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in files}
    try:
        vendor.copy("@fontsource/source-serif-4", out / "_static")
        set_mathematics(pages, out)
        components.embed(pages, out)
        if any(soup.select_one('script[src*="widgets/embed.js"]') for soup in pages.values()):
            vendor.copy("@jupyter-widgets/html-manager", out / "_static")
    except vendor.VendorError as error:
        logger.warning("%s", error, type="pages")
    components.previews(pages, out)
    mend_links_from_elsewhere(pages, out, app.config.html_baseurl.rstrip("/"))
    for page, soup in pages.items():
        mend_head(soup)
        mend_scripts(soup)
        mend_body(soup, page.parent)
        box_objectives(soup)
        set_percents(soup)
        set_cover(soup)
        components.quizzes(soup)
        slim.drop_idle_scripts(soup)
    slim.lighten_pictures(pages, out)
    slim.lighten_mathematics(pages, out)
    slim.join_styles(pages, out)
    for page, soup in pages.items():
        page.write_text(str(soup), encoding="utf-8")
        for problem in load_problems(soup, page, out):
            logger.warning("%s %s", page.name, problem, type="pages")


def set_mathematics(pages, out):
    """Set the formulas of all pages by one run of KaTeX, and link its style where there are any."""
    formulas = [
        (page, element) for page, soup in pages.items() for element in soup.select(".math.notranslate")
    ]
    if not formulas:
        return
    vendor.copy("katex", out / "_static")
    script = out / "_static" / "math" / "katex.min.js"
    script.write_bytes(vendor.read("katex", "dist/katex.min.js"))
    asked = [(tex_of(element), element.name == "div") for _, element in formulas]
    run = subprocess.run(
        [*vendor.node(), "-e", SET_FORMULAS, str(script)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    script.unlink()
    if run.returncode:
        raise vendor.VendorError(f"KaTeX failed: {(run.stderr.strip().splitlines() or ['no answer'])[-1]}")
    for (page, element), (tex, display), answer in zip(formulas, asked, json.loads(run.stdout), strict=True):
        if "problem" in answer:
            logger.warning(
                "%s: the formula %s cannot be set: %s", page.name, tex, answer["problem"], type="pages"
            )
            continue
        for part in [part for part in element.contents if isinstance(part, str)]:
            part.extract()
        element.append(BeautifulSoup(answer["html"], "html.parser"))
        if display:
            element["tabindex"] = "0"  # a wide formula scrolls
    for page in {page for page, _ in formulas}:
        link = pages[page].new_tag("link", rel="stylesheet", href="_static/math/katex.min.css")
        pages[page].head.append(link)


def tex_of(element):
    """The TeX of a formula, without the marks that Sphinx puts around it for a script."""
    tex = "".join(part for part in element.contents if isinstance(part, str)).strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if tex.startswith(opening) and tex.endswith(closing):
            return tex[2:-2].strip()
    return tex


def mend_head(soup):
    """Keep one viewport, leave the theme to the script, drop style sheets and preloads nothing uses."""
    soup.html.attrs.pop("data-theme", None)
    for extra in soup.select('meta[name="viewport"]')[1:]:
        extra.decompose()
    for link in soup.select('link[href*="sphinx-thebe"], link[rel="preload"]'):
        link.decompose()


def mend_scripts(soup):
    """Drop thebe, the icons' script and scripts that stand on the page twice; defer the files."""
    seen = set()
    for script in soup.find_all("script"):
        source, code = script.get("src", ""), script.string or ""
        unused = any(name in source for name in UNUSED_SCRIPTS) or "MathJax" in code[:20]
        thebe = "thebe" in script.get("type", "") or "THEBE_JS_URL" in code or code.startswith("kernelName")
        if unused or thebe or (source or code) in seen:
            script.decompose()
            continue
        seen.add(source or code)
        # Inline scripts write to DOCUMENTATION_OPTIONS at once, so its file cannot wait.
        if source and "documentation_options" not in source:
            script["defer"] = ""


def size_of(file):
    """Width and height of a PNG file in pixels, or None."""
    if file.suffix != ".png" or not file.is_file():
        return None
    with file.open("rb") as data:
        return struct.unpack(">II", data.read(24)[16:])


def mend_body(soup, folder):
    """Name what has no name, hide what is only ornament, keep one first-level heading."""
    for number, image in enumerate(soup.select("article img[src]")):
        if (size := size_of(folder / unquote(image["src"]))) and not image.get("style"):
            image["width"], image["height"] = size  # so that nothing moves when it comes
        if number:
            image["loading"] = "lazy"
    for icon in soup.select("i[class*=fa-], span[class*=fa-]"):
        icon["aria-hidden"] = "true"
    for button in soup.select("button[title]"):
        button["aria-label"] = button["title"]
        if button.get_text(strip=True):
            del button["aria-label"]
    for twin in soup.select("#jb-print-docs-body"):  # title and contents, a second time
        twin.decompose()
    for selector, name in NAMES.items():
        for element in soup.select(selector):
            element["aria-label"] = name
            if element.name != "dialog":
                element["role"] = "complementary"
    for summary in soup.select("summary[aria-label]"):
        del summary["aria-label"]
    for element in soup.select(".citation-list[role], .citation[role]"):
        del element["role"]
    for table in soup.select("article table"):
        if "pst-scrollable-table-container" not in table.parent.get("class", []):
            table.wrap(soup.new_tag("div", attrs={"class": "pst-scrollable-table-container"}))
        table.parent["tabindex"] = "0"  # where it is too wide it scrolls, by the keyboard, too
    for cell in soup.select("article thead th"):
        cell["scope"] = "col"
        if not cell.get_text(strip=True):
            cell.name = "td"
            del cell["scope"]
    if (header := soup.select_one("#pst-header")) and not header.get_text(strip=True):
        header["role"] = "presentation"


def set_cover(soup):
    """Put the title into the cover of the first page, and the drawing beside it."""
    if not (cover := soup.select_one("article .cover")):
        return
    cover.insert(0, soup.select_one("article h1").extract())
    drawing = (Path(__file__).parent.parent / "_static" / "cover.svg").read_text(encoding="utf-8")
    cover.select_one(".cover-art").append(BeautifulSoup(drawing, "html.parser"))


def box_objectives(soup):
    """Put the line "After this chapter you can" and its list into a box of their own."""
    for start in soup.select("article p"):
        following = start.find_next_sibling()
        if start.get_text().strip() == "After this chapter you can" and following and following.name == "ul":
            box = soup.new_tag("div", attrs={"class": "objectives"})
            start.insert_before(box)
            box.extend([start.extract(), following.extract()])


def set_percents(soup):
    """Write each percentage with a space that does not break; code and outputs stay as they are."""
    for text in soup.find_all(string=PERCENT):
        if not text.parent.css.closest(CODE):
            text.replace_with(PERCENT.sub("\N{NO-BREAK SPACE}%", text))


def load_problems(soup, page, out):
    """What the page loads from another site, or from a missing file, as a list of sentences."""
    problems = []
    addresses = [element["src"] for element in soup.select(LOADED)]
    addresses += [link["href"] for link in soup.select('link[rel~="stylesheet"], link[rel~="icon"]')]
    for address in addresses:
        parts = urlsplit(address)
        if parts.scheme == "data":
            continue
        if parts.scheme or parts.netloc:
            problems.append(f"loads {address} from another site: put the file into book/_static")
            continue
        file = (page.parent / unquote(parts.path)).resolve()
        if file.exists():
            continue
        problems.append(f"loads {file.relative_to(out)}, which is not in book/: add it")
    return problems


def setup(app):
    app.connect("config-inited", offer_launches, priority=900)
    app.connect("html-page-context", describe, priority=900)
    app.connect("build-finished", finish, priority=900)  # after the theme has written its last style sheet
    return {"parallel_read_safe": True, "parallel_write_safe": True}
