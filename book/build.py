"""Build the book: `python book/build.py OUT` makes OUT/index.html, and with --pdf a PDF of the whole.

The pages show the outputs that are stored in the notebooks; nothing is executed. Each build starts from
nothing, in a temporary folder, and takes the place of OUT only when it succeeded without a warning. An
existing OUT is replaced only if it is empty or an earlier build of this book.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

BOOK = Path(__file__).resolve().parent
CHAPTERS = BOOK.parent / "chapters"
MARKER = ".gpt-at-work-book"


class BuildError(Exception):
    """Why there is no book, in one line."""


def build(out: Path) -> Path:
    """Build the book into the folder `out` and return it: its `index.html` is the first page.

    Raises `BuildError` if `out` cannot be used, Jupyter Book is not installed, or the build gave a warning.
    """
    out = Path(out).expanduser().resolve()
    check_target(out)
    check_installed()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=out.parent) as folder:
        html = run_jupyter_book(Path(folder))
        (html / MARKER).touch()
        swap(html, out, Path(folder) / "previous")
    return out


def check_installed() -> None:
    if find_spec("jupyter_book") is None:
        raise BuildError("Jupyter Book is not installed: pip install -e '.[book]'")


def fetch_model() -> None:
    """Have the model for the pages here, with a bar while it comes; without it they show stored runs."""
    from companion.local import weights

    try:
        weights.path("smollm2-135m-instruct")
    except weights.WeightsError as error:
        print(f"the pages show stored runs only: {error}", file=sys.stderr)


def check_target(out: Path) -> None:
    """Refuse a target that is not a folder, holds other files, or lies among the sources."""
    if out == BOOK.parent or out.is_relative_to(CHAPTERS) or out.is_relative_to(BOOK):
        raise BuildError(f"{out} holds the book's sources: choose a folder outside chapters/ and book/")
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is a file: choose a folder")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise BuildError(f"{out} is not empty and is not an earlier build of this book: choose another")


def run_jupyter_book(folder: Path) -> Path:
    """Run `jupyter-book build`, warnings as errors, in `folder`; return the folder of the pages."""
    run = subprocess.run(
        [
            *(sys.executable, "-c", "from jupyter_book.cli.main import main; main()"),
            *("build", CHAPTERS, "--path-output", folder),
            *("--config", BOOK / "_config.yml", "--toc", BOOK / "_toc.yml"),
            *("-W", "-n", "--keep-going"),
        ],
        env=os.environ | {"PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    if run.returncode:
        report = re.sub(r"\x1b\[[0-9;]*m", "", run.stdout)
        descriptor, log = tempfile.mkstemp(prefix="book-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(report)
        causes = [line for line in report.splitlines() if re.search(r"WARNING: |ERROR: |\w+Error: ", line)]
        first = causes[0].strip() if causes else "Jupyter Book failed"
        raise BuildError(f"the book was not built: {first} (1 of {len(causes) or 1}; see {log})")
    return folder / "_build" / "html"


def swap(new: Path, out: Path, previous: Path) -> None:
    """Put `new` in the place of `out`; if that fails, `out` is as it was."""
    if out.exists():
        out.rename(previous)
    try:
        new.rename(out)
    except OSError:
        if previous.exists():
            previous.rename(out)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the book from the outputs stored in its notebooks.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the pages")
    parser.add_argument("--pdf", action="store_true", help="print the book, too; needs a Chromium")
    options = parser.parse_args()
    try:
        check_target(options.out.expanduser().resolve())
        check_installed()
        sys.path.insert(0, str(BOOK / "_ext"))
        import printed

        if options.pdf:
            printed.browser()
        fetch_model()
        html = build(options.out)
        if options.pdf:
            print(printed.print_book(html))
    except (BuildError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(html / "index.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
