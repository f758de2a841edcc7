"""Say where the repository is: `python book/publish.py https://github.com/you/gpt-at-work`.

Writes the address into `book/_config.yml`, so that the pages have buttons for Binder and Colab (and for
the JupyterHub that is named there), and into every notebook a first cell that fetches and installs the
course where it is missing, as on Colab. `python book/publish.py ""` takes both away again. Binder and a dev
container need no such cell: `.binder/` and `.devcontainer/` install the course.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ID = "install-the-course"
CELL = """\
# Where the course is not installed, as on Colab, fetch it, install it, and stand where its notebooks do.
from importlib.util import find_spec

if find_spec("companion") is None:
    !git clone -q --depth 1 --branch {branch} {address} course
    %pip install -q "./course[train]"
    %cd -q course/{folder}"""


def publish(address: str, root: Path = ROOT) -> int:
    """Write `address` into the configuration and the notebooks; return how many notebooks changed.

    Raises ValueError for an address that git could not fetch from without a password.
    """
    plain = re.fullmatch(r"https://[\w.:-]+(/[\w.~-]+){2,}/?", address, re.ASCII)
    if address and not plain:
        raise ValueError(
            f"{address!r} is not a repository's address: give one like https://github.com/you/course"
        )
    config = root / "book" / "_config.yml"
    text = config.read_text(encoding="utf-8")
    text, count = re.subn(r"(?m)^(repository:\n  url: ).*$", rf'\g<1>"{address}"', text)
    if count != 1:
        raise ValueError(f"{config} has no line `url:` below `repository:`: add it")
    if not (branch := re.search(r"(?m)^  branch: ([\w./-]+)$", text)):
        raise ValueError(f"{config} has no line `branch:` below `repository:`: add it")
    config.write_text(text, encoding="utf-8")
    changed = 0
    for file in sorted([*(root / "chapters").glob("*.ipynb"), *(root / "exercises").glob("*.ipynb")]):
        before = file.read_text(encoding="utf-8")
        notebook = json.loads(before)
        cells = [cell for cell in notebook["cells"] if cell.get("id") != ID]
        if address:
            cell = CELL.format(address=address, branch=branch[1], folder=file.parent.name)
            first = {
                "cell_type": "code",
                "execution_count": None,
                "id": ID,
                "metadata": {"tags": ["remove-cell", "nbval-skip"]},
                "outputs": [],
                "source": cell.splitlines(keepends=True),
            }
            cells.insert(0, first)
        notebook["cells"] = cells
        after = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        if after != before:
            file.write_text(after, encoding="utf-8")
            changed += 1
    return changed


def main() -> int:
    if len(sys.argv) != 2:
        print('usage: python book/publish.py ADDRESS, or "" to take it away', file=sys.stderr)
        return 2
    try:
        changed = publish(sys.argv[1])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{changed} notebooks changed: build the book again")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
