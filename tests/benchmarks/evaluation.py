"""What an evaluation costs, measured side by side in one run; nothing is asserted.

    python tests/benchmarks/evaluation.py [--rounds 3] [--samples 64] [--inspect PYTHON]

The solver is the local model, on customers' tickets; the sides take turns on the same tickets, with the same
options, and each figure is the median of the rounds. --inspect (or INSPECT_PYTHON) is the Python of an
environment with inspect_ai and openai, which runs the same samples on the same endpoint with as many
connections. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import companion
from companion import shop
from companion.evaluation import Sample, evaluate
from companion.local import process

CONCURRENCY = 8
OPTIONS = {"temperature": 0.0, "seed": 0}
LENGTHS = {"labels": 24, "replies": 96, "letters": 256}  # tokens of an answer, at most

INSPECT = """
import json, os, sys, tempfile, time
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
given = json.load(sys.stdin)
model = get_model(f"openai-api/local/{given['model']}", base_url=given["base_url"], api_key=given["api_key"])
def run(texts):
    samples = MemoryDataset([Sample(input=text, target="parcel") for text in texts])
    task = Task(dataset=samples, solver=generate(), scorer=includes())
    with tempfile.TemporaryDirectory() as logs:
        start = time.perf_counter()
        (log,) = eval(task, model=model, display="none", log_dir=logs, max_connections=given["concurrency"],
                      max_samples=given["concurrency"], **given["options"])
        seconds = time.perf_counter() - start
        assert log.status == "success" and len(log.samples) == len(texts), log.error
    return seconds
run(given["texts"][:2])
print(run(given["texts"]))
"""

MEMORY = """
import resource, sys
from companion.evaluation import Sample, evaluate
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
number = int(sys.argv[1])
samples = [Sample(f"question {i} " + "x" * 500, target=str(i)) for i in range(number)]
evaluate(str, samples[:100], lambda answer, sample: True, progress=False).summary()
before = used()
run = evaluate(lambda text: text * 2, samples, lambda answer, sample: True, progress=False)
ran = used()
run.summary()
print(ran - before, used() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--inspect", default=os.environ.get("INSPECT_PYTHON"), metavar="PYTHON")
    chosen = parser.parse_args()
    overhead(chosen.rounds)
    memory()
    for answers in LENGTHS:
        speed(chosen.rounds, chosen.samples, chosen.inspect, answers)


def report(what: str, ratio: float, note: str) -> None:
    print(f"{what:58} {ratio:6.2f}   {note}", flush=True)


def has_parcel(answer, sample) -> bool:
    return sample.target in answer.text.lower()


def speed(rounds: int, number: int, inspect: str | None, answers: str) -> None:
    """Samples a second with the local model: ours, a loop, and inspect_ai.

    answers: which of LENGTHS. What can be gained side by side is the writing; each prompt is read by both
    processors as it is, and to read a letter takes as long as to write some 30 tokens.
    """
    options = OPTIONS | {"max_tokens": LENGTHS[answers]}
    texts = shop.tickets("train").text.tolist()[:number]
    samples = [Sample(text, "parcel") for text in texts]
    model, client, endpoint = companion.chat_model(), companion.client(), process.ensure()

    def ours() -> float:
        start = time.perf_counter()
        run = evaluate(model, samples, has_parcel, concurrency=CONCURRENCY, progress=False, **options)
        seconds = time.perf_counter() - start
        assert run.failures.empty, run.failures
        return seconds

    def loop() -> float:
        right = []
        start = time.perf_counter()
        for text in texts:
            messages = [{"role": "user", "content": text}]
            reply = client.chat.completions.create(model=model, messages=messages, **options)
            right.append("parcel" in reply.choices[0].message.content.lower())
        return time.perf_counter() - start

    def theirs() -> float:
        given = {"model": model, "base_url": endpoint.base_url, "api_key": endpoint.token, "texts": texts}
        given |= {"concurrency": CONCURRENCY, "options": options}
        done = subprocess.run(
            [inspect, "-c", INSPECT], input=json.dumps(given), capture_output=True, text=True, check=True
        )
        return float(done.stdout.split()[-1])

    sides = {"ours": ours, "loop": loop} | ({"theirs": theirs} if inspect else {})
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):  # the first to warm up
        for name, side in sides.items():
            taken = side()
            if turn:
                seconds[name].append(taken)
    rate = {name: number / statistics.median(taken) for name, taken in seconds.items()}
    note = f"{rate['ours']:.2f} and {rate['loop']:.2f} samples/s, concurrency {CONCURRENCY}"
    report(f"evaluate / a sequential loop, same endpoint: {answers}", rate["ours"] / rate["loop"], note)
    if inspect:
        note = f"{rate['ours']:.2f} and {rate['theirs']:.2f} samples/s"
        report(f"evaluate / inspect_ai, as many at once: {answers}", rate["ours"] / rate["theirs"], note)
    else:
        print("evaluate / inspect_ai: not measured, give --inspect the Python of its environment")


def overhead(rounds: int, number: int = 10_000) -> None:
    """Milliseconds a sample with a solver that takes none."""
    samples = [Sample(f"question {i}", target=str(i)) for i in range(number)]
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        evaluate(str, samples, has_parcel, concurrency=CONCURRENCY, progress=False)
        taken.append((time.perf_counter() - start) / number * 1000)
    milliseconds = statistics.median(taken)
    report("own overhead a sample / 0.5 ms", milliseconds / 0.5, f"{milliseconds:.3f} ms")


def memory(number: int = 100_000) -> None:
    """What 100,000 samples with answers of 1,000 characters add to the process that has them."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(number)], capture_output=True, text=True, check=True
    )
    ran, read = map(float, done.stdout.split())
    print(
        f"memory that {number:,} samples add: {ran:.0f} MB in evaluate(), {read:.0f} MB with summary()",
        flush=True,
    )


if __name__ == "__main__":
    main()
