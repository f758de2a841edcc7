"""The `companion` command: one line for what went wrong, never a traceback for bad input."""

from __future__ import annotations

import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="GPT for customer service and sales: the course's command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
CHECKOUT = Path(__file__).parents[1]


@app.command()
def book(
    out: Annotated[Path, typer.Option(help="Folder for the pages; made anew by each build.")] = Path(
        "_build/html"
    ),
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the pages on this machine and open the browser.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port for --serve; 0 takes a free one.")] = 0,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print the whole book, too; needs a Chromium.")] = False,
) -> None:
    """Build the HTML book from clean and say where its pages are."""
    script = _in_checkout("book/build.py")
    command = [sys.executable, str(script), str(out), *(["--pdf"] if pdf else [])]
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)
    if serve:
        _serve_pages(out, port)


@app.command()
def lab() -> None:
    """Open JupyterLab on the chapters and exercises, with the local endpoint running."""
    _in_checkout("chapters")
    _needs("jupyterlab", "book")
    from companion import backend

    if backend.is_local():
        backend.client()
    raise SystemExit(
        subprocess.run([sys.executable, "-m", "jupyterlab", f"--notebook-dir={CHECKOUT}"]).returncode
    )


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    token: Annotated[
        str | None, typer.Option(help="API key that clients must send; drawn if not given.")
    ] = None,
) -> None:
    """Run an OpenAI-compatible endpoint in the foreground; prints OPENAI_BASE_URL and OPENAI_API_KEY."""
    from companion.local import gateway, weights

    for name in weights.MODELS:
        weights.path(name)
    gateway.serve(host=host, port=port, token=token, shared=False)


@app.command()
def chat(system: Annotated[str | None, typer.Option(help="Instructions for the model.")] = None) -> None:
    """Talk to the model in the terminal; an empty line or Ctrl-D ends."""
    from companion import Chat

    conversation = Chat(system)
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        try:
            for piece in conversation.stream(text):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped; this turn is forgotten)", end="")
        print()


@app.command()
def finetune(
    training: Annotated[
        Path, typer.Argument(help="Examples: a JSONL file of OpenAI's chat format, or a CSV file.")
    ],
    validation: Annotated[Path | None, typer.Option(help="Examples to watch the training with.")] = None,
    text: Annotated[str, typer.Option(help="In a CSV file, the column of what is asked.")] = "text",
    label: Annotated[
        list[str] | None,
        typer.Option(help="... and that of the answer ('label'). Several: an answer in JSON."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to start from.")] = None,
    suffix: Annotated[str | None, typer.Option(help="A name of your own in the tuned model's name.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often each example is seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    learning_rate_multiplier: Annotated[
        float | None, typer.Option(help="Of the learning rate that the endpoint takes by itself.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same model.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start the job, print its id, and leave.")] = False,
) -> None:
    """Fine-tune a model on your examples, and print its name."""
    from companion import dataset, finetuning

    def chosen(value):
        return "auto" if value is None else value

    def read(path):
        if path is None or path.suffix.lower() not in (".csv", ".tsv"):
            return path
        answer = label or ["label"]
        return dataset.from_csv(path, text, answer[0] if len(answer) == 1 else answer)

    try:
        job = finetuning.fine_tune(
            read(training),
            read(validation),
            model=model,
            suffix=suffix,
            n_epochs=chosen(epochs),
            batch_size=chosen(batch_size),
            learning_rate_multiplier=chosen(learning_rate_multiplier),
            seed=seed,
        )
    except dataset.DatasetError as error:
        for problem in error.problems:
            print(f"{error.source}: {problem}", file=sys.stderr)
        raise SystemExit(1) from None
    if detach:
        print(job.id)
        return
    job = finetuning.follow(job)
    if job.status != "succeeded":  # cancelled, or left to itself by Ctrl-C
        raise SystemExit(1)
    print(job.fine_tuned_model)


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="A fine-tuning job or a tuned model.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="A full checkpoint, base and adapter in one.")
    ] = False,
    trl: Annotated[bool, typer.Option("--trl", help="The job, for `trl sft` on a cluster.")] = False,
) -> None:
    """Write a tuned model's adapter, for PEFT and for llama.cpp, or what --merged and --trl say."""
    from companion.local import export as exports

    if merged and trl:
        raise ValueError("--merged and --trl write different things: give one of them")
    write = exports.merged if merged else exports.trl if trl else exports.adapter
    write(name, out)
    print(f"wrote {out}")
    if trl:
        print(
            "on the cluster, where `pip install 'trl[peft]==1.16.0'` was run:\n"
            f"cd {out} && accelerate launch -m trl.scripts.sft --config sft.yaml"
        )


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="The log of a run of companion.evaluate: what was before.")],
    new: Annotated[Path, typer.Argument(help="The log of a run with the same samples.")],
    scorer: Annotated[str | None, typer.Option(help="The score to compare, if there are several.")] = None,
    margin: Annotated[float, typer.Option(help="How much worse is not yet worse.")] = 0.0,
) -> None:
    """Compare two evaluations: exit status 1 if the new one is worse, 0 if not, 2 if that cannot be done."""
    from companion import evaluation

    try:
        comparison = evaluation.compare(evaluation.load(old), evaluation.load(new), scorer, margin=margin)
    except (ValueError, OSError) as error:
        print(f"companion: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(comparison)
    raise SystemExit(1 if comparison.verdict == "worse" else 0)


@app.command()
def pull() -> None:
    """Fetch the models (176 MB to download), and say where they are."""
    from companion.local import weights

    for name in weights.MODELS:
        print(f"{name}: {weights.path(name)}")


@app.command()
def stop() -> None:
    """End the local endpoint, if one runs."""
    from companion.local import process

    if endpoint := process.living():
        process.stop(endpoint)
        print(f"stopped the endpoint at {endpoint.base_url}")
    else:
        print("no endpoint is running")


@app.command()
def release(
    source: Annotated[
        Path | None, typer.Argument(help="Folder of the solutions; the course's own if not given.")
    ] = None,
    target: Annotated[Path | None, typer.Argument(help="Folder for the learner's notebooks.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run each solution and its wrong answers, too: who earns what?")
    ] = False,
) -> None:
    """Make the learner's exercise notebooks from their solutions."""
    _needs("nbformat", "book")
    from companion.grading import backcheck
    from companion.grading.release import release as make

    source = source or _in_checkout("exercises/solutions")
    for file in make(source, target or source.parent):
        print(f"wrote {file}")
    if check:
        found = {file.name: backcheck.back_check(file) for file in sorted(source.glob("*.ipynb"))}
        for name, complaints in found.items():
            print(f"{name}: " + ("its checks tell right from wrong" if not complaints else "see below"))
        if any(found.values()):
            lines = [f"  {name}: {complaint}" for name, all_ in found.items() for complaint in all_]
            raise SystemExit("\n".join(["companion: some checks do not tell right from wrong:", *lines]))


@app.command()
def progress(
    place: Annotated[
        Path | None, typer.Argument(help="A notebook or a folder; the course's exercises if not given.")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run the notebooks afresh; without, their saved checks are read.")
    ] = False,
) -> None:
    """Show which exercises pass: exit status 0 if all do, 1 if not, 2 if that cannot be said."""
    try:
        _needs("nbformat", "book")
        from companion.grading import progress as learners

        found = learners.read(place or _in_checkout("exercises"), run)
    except (ValueError, OSError) as error:
        print(f"companion: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("exercise", "question", "points", "", "what to do", box=None, pad_edge=False)
    marks = {"passed": ("✓ passed", "green"), "not yet": ("✗ not yet", "red"), "not run": ("– not run", "")}
    for exercise in found:
        name = exercise.name
        for check in exercise.checks:
            # Text, since what a check says may hold what rich takes for markup.
            note, points = Text(check.note), f"{check.points:g}"
            table.add_row(Text(name), Text(check.question), points, Text(*marks[check.state]), note)
            name = ""
    console = Console()
    console.print(table)
    passed, points = (sum(getattr(one, part) for one in found) for part in ("passed", "points"))
    console.print(f"{passed:g} of {points:g} points pass", highlight=False)
    raise SystemExit(0 if passed == points else 1)


@app.command()
def grade(
    submissions: Annotated[
        Path, typer.Argument(help="Folder: <learner>/<exercise>/, or what Canvas and Moodle download.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the gradebook, feedback and reports.")],
    exercises: Annotated[
        Path | None, typer.Option(help="Folder of the solutions; the course's own if not given.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Notebooks that run at the same time; one a core if not given.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of all hidden inputs; if not given, one is drawn for all that is new in --out."),
    ] = None,
    no_sandbox: Annotated[
        bool, typer.Option("--no-sandbox", help="Run strangers' code as it is: only where you trust it all.")
    ] = False,
) -> None:
    """Grade submissions: gradebook.csv, feedback pages, an overview, and tables for Canvas and Moodle."""
    _needs("nbval", "test")
    _needs("xdist", "test")
    _needs("ipykernel", "book")
    from companion.grading import grade as grading

    exercises = exercises or _in_checkout("exercises/solutions")
    book = grading.grade(
        submissions, out, exercises, workers=workers or _cores(), seed=seed, sandboxed=not no_sandbox
    )
    if no_sandbox:
        print("graded without a sandbox: submissions could do anything on this machine", file=sys.stderr)
    if book.weak:
        print(f"without hidden tests, and so weaker: {', '.join(book.weak)}", file=sys.stderr)
    found = [work.status for work in book.works]
    counts = ", ".join(f"{found.count(status)} {status}" for status in sorted(set(found)))
    sizes = f"{_count(book.learners, 'learner')}, {_count(book.measures, 'exercise')}"
    seeds = ", ".join(map(str, book.seeds)) or "none"
    print(f"{sizes}, seed {seeds}: {counts}")
    print(
        f"wrote {out}/overview.html, gradebook.csv, checks.json, feedback/, and tables for Canvas and Moodle"
    )
    if failed := found.count("not graded"):
        raise SystemExit(f"companion: no kernel could be started for {failed} notebooks: grade again")


@app.command()
def doctor() -> None:
    """Say what is missing here, and how to mend it."""
    from companion import diagnosis

    found = diagnosis.examine()
    for finding in found:
        print(finding)
    raise SystemExit(0 if all(finding.good for finding in found) else 1)


def _in_checkout(name: str) -> Path:
    path = CHECKOUT / name
    if not path.exists():
        raise ValueError(
            f"{name} is not here: this command needs a clone of the course, installed with "
            "`pip install -e '.[all]'`"
        )
    return path


def _count(things, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _needs(module: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise ValueError(f"{module} is not installed: run `pip install -e '.[{extra}]'`")


def page_server(pages: Path, port: int = 0):
    """A server of the folder `pages` on this machine; text goes out compressed, as from any host."""
    import gzip
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from io import BytesIO

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def send_head(self):
            file = Path(self.translate_path(self.path))
            file = file / "index.html" if file.is_dir() and self.path.endswith("/") else file
            text = file.suffix in (".html", ".css", ".js", ".svg", ".wasm")
            if not text or not file.is_file() or "gzip" not in self.headers.get("Accept-Encoding", ""):
                return super().send_head()
            data = gzip.compress(file.read_bytes(), 6)
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(str(file)))
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return BytesIO(data)

    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(pages)))


def _serve_pages(pages: Path, port: int) -> None:
    with page_server(pages, port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address}  (Ctrl-C ends)", flush=True)
        webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main() -> None:
    """The entry point: what a caller or the machine got wrong is said in one line."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"companion: {error}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] != "openai":
            raise
        raise SystemExit(f"companion: {error}") from None
