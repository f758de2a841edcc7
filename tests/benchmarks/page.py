"""What the pages weigh and how fast they are: Lighthouse on a phone, and the model in the page.

    python tests/benchmarks/page.py BOOK --lighthouse PROGRAM [--runs 5] [PAGE ...]

BOOK is a built book, PROGRAM npm's `lighthouse` (it is no dependency of the course: `npm install
lighthouse` in a folder of your own). Prints a line for each page, the median of the runs; then, in
Chromium, the seconds from the click to the first probability, for the first time and from the browser's
own store, and tokens a second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "book" / "_ext"))
import printed

from companion.cli import page_server

SCORES = ("performance", "accessibility", "best-practices", "seo")


def serve(book: Path) -> str:
    server = page_server(book)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def lighthouse(program: str, url: str) -> dict:
    flags = "--headless=new --no-sandbox --disable-gpu --disable-background-networking"
    run = subprocess.run(
        [
            program,
            url,
            "--output=json",
            "--quiet",
            f"--chrome-flags={flags}",
            f"--only-categories={','.join(SCORES)}",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"CHROME_PATH": printed.browser()},
    )
    report = json.loads(run.stdout)
    requests = report["audits"]["network-requests"]["details"]["items"]
    return {name: 100 * report["categories"][name]["score"] for name in SCORES} | {
        "KB": sum(one.get("transferSize", 0) for one in requests) / 1000,
        "elsewhere": sum(not one["url"].startswith((url.rsplit("/", 1)[0], "data:")) for one in requests),
    }


def in_the_page(url: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=printed.browser(), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{url}/playground.html")
        for when in ("first time", "kept by the browser"):
            page.reload()
            begin = time.perf_counter()
            page.click(".try[data-try=explorer] .try-load")
            page.wait_for_selector(".try[data-try=explorer][data-source=model]", timeout=120_000)
            print(f"click to first probability, {when}: {time.perf_counter() - begin:.1f} s")
        page.get_by_role("button", name="Send to both").click()
        said = ".try[data-try=chat] .try-said"
        page.wait_for_function(
            f"document.querySelector('{said}').textContent.includes('second')", timeout=120_000
        )
        print(page.inner_text(said))
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the built book.")
    parser.add_argument("book", type=Path)
    parser.add_argument("pages", nargs="*", default=["installation", "03_pretraining", "01_what_is_chatgpt"])
    parser.add_argument("--lighthouse", metavar="PROGRAM")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    url = serve(options.book)
    for name in options.pages if options.lighthouse else []:
        runs = [lighthouse(options.lighthouse, f"{url}/{name}.html") for _ in range(options.runs)]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(name, " ".join(f"{key} {value:.0f}" for key, value in medians.items()), flush=True)
    in_the_page(url)


if __name__ == "__main__":
    main()
