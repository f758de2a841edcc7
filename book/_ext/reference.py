"""Sphinx extension: the package's docstrings, made ready for the reference page.

A docstring describes its arguments either in Google's sections, which napoleon reads, or in lines of the form
`name, name: what it is`. Those become a field list here, as reStructuredText has them.
"""

import re

FIELD = re.compile(r"\*{0,2}[a-z_]\w*(, \*{0,2}[a-z_]\w*)*: ")
SECTION = re.compile(r"(Args|Returns|Yields|Raises|Attributes|Examples?|Notes?):\s*$")


def mark_fields(app, what, name, obj, options, lines):
    """Turn paragraphs that begin with `name: ` into field lists, in place."""
    marked, inside, section = [], False, False
    for line in lines:
        if line and not line.startswith(" "):
            section = bool(SECTION.match(line))
        if not line.strip():
            inside = False
        elif not section and not line.startswith(" ") and FIELD.match(line):
            begins = not inside and marked and marked[-1].strip()
            described, text = line.split(": ", 1)
            names = described.replace("*", r"\*")
            marked += [""] * bool(begins) + [f":{names}: {text}"]
            inside = True
            continue
        marked.append(f"    {line.strip()}" if inside else line)
    lines[:] = marked


def setup(app):
    app.connect("autodoc-process-docstring", mark_fields, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
