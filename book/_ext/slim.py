"""Pages that weigh little: one style sheet with what is used, few icons, no idle script, small pictures.

The theme's style sheets hold ten times more rules than the pages need. After the build the rules whose
classes, ids and elements occur in no page and in no script are left out, the rest becomes one file. Rules
are kept in doubt: what stands in :is(), :not(), :has() or an attribute's brackets is not looked at.
"""

import hashlib
import io
import posixpath
import re

import tinycss2
from PIL import Image

IDLE = {  # scripts, and what a page must have for them to have work
    "bootstrap.js": None,
    "clipboard.min.js": None,
    "copybutton.js": None,
    "sphinx_highlight.js": "#search-results",
    "doctools.js": "#search-results",
    "searchtools.js": "#search-results",
    "language_data.js": "#search-results",
    "searchindex.js": "#search-results",
    "togglebutton.js": ".toggle, .admonition.dropdown",
    "design-tabs.js": ".sd-tab-set",
}
OWN = ("math/", "try.css")  # sheets of single pages
# Parts of the theme that the book does not switch on, though a script of the theme names them.
ABSENT = re.compile(
    r"version-(warning|switcher)|announcement|tooltip|popover|nb(in|out)put|jp-|(navbar|menu|table|btn)-dark|data-bs-theme=|"
    r"list-group|sidebar-hidden|\.thebe|data-readthedocs|rtd|\.progress|file-selector|modal-|carousel|offcanvas|"
    r"\.(is-)?invalid|placeholder|autofill"
)
WORD = re.compile(r"-?[A-Za-z_][\w-]*")
NAMED = re.compile(r"[.#](-?[A-Za-z_][\w-]*)")
ELEMENT = re.compile(r"(?:^|[\s>+~])([a-z][a-z0-9]*)")
VARIABLE = re.compile(r"var\(\s*(--[\w-]+)")


def drop_idle_scripts(soup):
    for script in soup.select("script"):
        name = script.get("src", "").split("?")[0].rsplit("/", 1)[-1]
        code = script.string or ""
        folds = re.search("toggleHint|toggleOpenOnPrint|togglebuttonSelector", code)
        needs = IDLE["togglebutton.js"] if folds else IDLE.get(name, "html")
        if not (needs and soup.select_one(needs)):
            script.decompose()


def lighten_pictures(pages, out):
    """Store the notebooks' figures as lossless WebP: the same pixels in a third of the bytes."""
    for soup in pages.values():
        for name, elements in (("src", soup.select("img[src]")), ("href", soup.select("a[href]"))):
            for element in elements:
                address = element[name]
                if re.fullmatch(r"_images/[^?#]+\.png", address):
                    element[name] = address.removesuffix(".png") + ".webp"
    for file in (out / "_images").glob("*.png"):
        with Image.open(file) as picture:
            picture.save(file.with_suffix(".webp"), lossless=True, exact=True)
        file.unlink()


def join_styles(pages, out):
    """Replace the sheets that all pages load by one, and the icons' font by what is left of it."""
    sheets = {}
    for soup in pages.values():
        for link in soup.select('link[rel~="stylesheet"]'):
            address = link["href"].split("?")[0]
            if not any(own in address for own in OWN):
                sheets.setdefault(posixpath.normpath(address), None)
    words, elements = vocabulary(pages, out)
    kept = []
    for sheet in sheets:
        text = (out / sheet).read_text(encoding="utf-8")
        if sheet.endswith("styles/theme.css"):  # all that it does is to import this one
            text = (out / "_static" / "basic.css").read_text(encoding="utf-8")
        rules = tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)
        kept.append("".join(used(rules, words, elements, posixpath.dirname(sheet))))
    css = without_unused_variables("".join(kept), "".join(str(soup) for soup in pages.values()), out)
    css = '@charset "utf-8";' + with_few_icons(css, out)
    name = f"_static/style-{hashlib.sha256(css.encode()).hexdigest()[:10]}.css"
    (out / name).write_text(css, encoding="utf-8")
    for soup in pages.values():
        links = [
            link
            for link in soup.select('link[rel~="stylesheet"]')
            if not any(own in link["href"] for own in OWN)
        ]
        links[0].insert_before(soup.new_tag("link", rel="stylesheet", href=name))
        for link in links:
            link.decompose()
    for sheet in [*sheets, "_static/basic.css"]:
        (out / sheet).unlink(missing_ok=True)


def vocabulary(pages, out):
    """Every word that a class or an id may be, and the names of all elements."""
    words, elements = set(), set()
    scripts = set()
    for soup in pages.values():
        for element in soup.find_all(True):
            elements.add(element.name)
            words.update(element.get("class", []))
            words.add(element.get("id", ""))
            if element.name == "script":
                scripts.add(element.get("src", "").split("?")[0])
                words.update(
                    WORD.findall(element.string or "") if element.get("type") != "application/json" else []
                )
    for script in scripts:
        if script and script != "searchindex.js" and (out / script).is_file():
            words.update(WORD.findall((out / script).read_text(encoding="utf-8")))
    return words, elements | {"option", "textarea", "input", "select", "progress", "output", "button"}


def used(rules, words, elements, folder):
    """The text of the rules that may apply to something, one after the other."""
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = split(rule.prelude)
            left = [selector for selector in selectors if may_match(selector, words, elements)]
            body = moved(tinycss2.serialize(rule.content), folder)
            if left and body.strip():
                yield f"{','.join(left)}{{{squeezed(body)}}}"
        elif rule.type == "at-rule":
            head = tinycss2.serialize(rule.prelude).strip()
            keyword = rule.lower_at_keyword
            if keyword in ("media", "supports") and rule.content is not None:
                inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
                text = "".join(used(inner, words, elements, folder))
                if text:
                    yield f"@{keyword} {head}{{{text}}}"
            elif keyword not in ("charset", "import", "keyframes") and rule.content is not None:
                body = squeezed(moved(tinycss2.serialize(rule.content), folder))
                if keyword != "font-face" or "Awesome" not in body or ("900" in body and "Free" in body):
                    yield f"@{keyword} {head}{{{body}}}"


def split(prelude):
    """The selectors of a list, each as text."""
    parts, current = [], []
    for token in prelude:
        if token.type == "literal" and token.value == ",":
            parts.append(current)
            current = []
        else:
            current.append(token)
    return [re.sub(r"\s+", " ", tinycss2.serialize(part)).strip() for part in [*parts, current]]


def may_match(selector, words, elements):
    plain = re.sub(r"\[[^\]]*\]", "", selector)
    while "(" in plain:
        shorter = re.sub(r":[\w-]+\([^()]*\)", "", plain)
        plain = shorter if shorter != plain else plain.replace("(", " ", 1)
    if "\\" in plain or ABSENT.search(selector):  # escaped names are utility classes, which no page has
        return False
    if any(name not in words for name in NAMED.findall(plain)):
        return False
    return all(name in elements for name in ELEMENT.findall(plain))


def moved(body, folder):
    """The declarations with addresses as seen from _static/."""

    def move(match):
        address = match[2]
        if address.startswith(("data:", "#")) or "://" in address:
            return match[0]
        return f"url({posixpath.relpath(posixpath.normpath(posixpath.join(folder, address)), '_static')})"

    return re.sub(r"""url\(\s*(["']?)([^"')]+)\1\s*\)""", move, body)


def squeezed(body):
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    return re.sub(r"\s*([;{}])\s*", r"\1", re.sub(r"\s+", " ", body)).strip().rstrip(";")


def without_unused_variables(css, markup, out):
    """Leave out what sets a variable that nothing reads, until none is left."""
    scripts = "".join(file.read_text(encoding="utf-8") for file in (out / "_static").glob("*.js"))
    others = "".join(file.read_text(encoding="utf-8") for file in (out / "_static").glob("try.css"))
    outside = set(re.findall(r"--[\w-]+", markup)) | set(re.findall(r"--[\w-]+", scripts + others))
    declared = re.compile(r"(?<=[{;])(--[\w-]+):((?:[^;{}\"']|\"[^\"]*\"|'[^']*')*);?")
    while True:
        read = outside | set(VARIABLE.findall(css))
        idle = {found[1] for found in declared.finditer(css)} - read
        shorter = declared.sub(lambda found, idle=idle: "" if found[1] in idle else found[0], css)
        shorter = re.sub(r"[^{};]+\{\}", "", shorter)
        if shorter == css:
            return css
        css = shorter


def with_few_icons(css, out):
    """Cut the icons' font down to those that a rule still draws."""
    wanted = {ord(letter) for letter in css if "\uf000" <= letter <= "\uf8ff"}
    found = re.search(r"url\(([^)]*fa-solid-900\.woff2)\)", css)
    if not found:
        return css
    few = _with_few_letters(out / "_static" / found[1], wanted)
    (out / "_static" / "fonts" / "icons.woff2").write_bytes(few)
    face = re.compile(r"src:[^;}]*fa-solid-900[^;}]*")
    return face.sub('src:url(fonts/icons.woff2) format("woff2")', css)


def lighten_mathematics(pages, out):
    """Cut the fonts of the formulas down to the letters that a formula shows."""
    letters = {
        ord(letter)
        for soup in pages.values()
        for formula in soup.select(".katex-html")
        for letter in formula.get_text()
    }
    for file in (out / "_static" / "math" / "fonts").glob("*.woff2"):
        file.write_bytes(_with_few_letters(file, letters))


def _with_few_letters(font, letters):
    """A font file as woff2 that has only these letters, given as code points."""
    from fontTools import subset

    options = subset.Options(flavor="woff2", layout_features=[], name_IDs=[], notdef_outline=True)
    few = subset.load_font(str(font), options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=letters)
    cutter.subset(few)
    few.flavor = "woff2"
    data = io.BytesIO()
    few.save(data)
    return data.getvalue()
