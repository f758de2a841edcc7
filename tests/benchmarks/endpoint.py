"""What the endpoint costs, measured side by side in one run; nothing is asserted.

    python tests/benchmarks/endpoint.py [--rounds 5]

Each figure is the median of some rounds in which the two sides take turns, so that a busy machine slows both.
Run it on a machine that does nothing else: two engines on two cores slow each other far more than by half.
transformers and sentence-transformers are compared with where they are installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

import companion
from companion.local import process, weights

PROMPT = "Write a long story about a walk in the hills."
TOKENS = 160
MODEL = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    imports(rounds)
    starts()
    streams(rounds)
    embeddings(rounds)


def report(what: str, ratio: float, note: str) -> None:
    print(f"{what:58} {ratio:6.2f}   {note}", flush=True)


def turns(rounds: int, **sides):
    """The median seconds of each side; the sides take turns, after one round to warm up."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def imports(rounds: int) -> None:
    def load(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    took = turns(rounds, nothing=load(""), sdk=load("import openai"), ours=load("import companion"))
    report(
        "import companion / import openai",
        took["ours"] / took["sdk"],
        f"{took['ours']:.2f} s and {took['sdk']:.2f} s",
    )
    both = turns(rounds, sdk=load("import openai"), ours=load("import companion, openai"))
    report("import companion and openai / import openai", both["ours"] / both["sdk"], "")


def starts() -> None:
    """client() to the first token, with the weights cached: no endpoint yet, and one that runs."""
    code = (
        "import time; t = time.perf_counter(); import companion; c = companion.client()\n"
        "s = c.chat.completions.create(model=companion.chat_model(), max_tokens=8, stream=True,"
        " messages=[{'role': 'user', 'content': 'Hello'}])\n"
        "next(chunk for chunk in s if chunk.choices and chunk.choices[0].delta.content)\n"
        "print(time.perf_counter() - t)"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(weights.home() / "models")
        home = os.environ | {"COMPANION_HOME": folder}

        def first_token() -> float:
            done = subprocess.run(
                [sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True
            )
            return float(done.stdout)

        cold, warm = first_token(), statistics.median(first_token() for _ in range(3))
        subprocess.run(
            [sys.executable, "-c", "from companion.cli import main; main()", "stop"], env=home, check=True
        )
    report(
        "client() to first token, cold / warm",
        cold / warm,
        f"{cold:.2f} s and {warm:.2f} s, imports included",
    )


def streams(rounds: int) -> None:
    """Tokens a second: llama.cpp called in this process, the gateway with the SDK, and transformers."""
    import xllamacpp

    client = companion.client()
    messages = [{"role": "user", "content": PROMPT}]
    options = {"temperature": 0.0, "max_tokens": TOKENS}
    params = xllamacpp.CommonParams()
    params.model.path = str(weights.path(MODEL))
    params.verbosity = 0
    params.n_parallel, params.n_ctx, params.kv_unified, params.cache_ram_mib = 8, 16384, False, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
    params.n_threads_http = 64
    server = xllamacpp.Server(params)
    bare = openai.OpenAI(base_url=f"{server.listening_address}/v1", api_key="none")
    made: dict[str, int] = {}

    def direct(number: int = 0) -> int:
        body = {
            "messages": varied(number),
            **options,
            "cache_prompt": False,
            "top_k": 0,
            "min_p": 0.0,
            "top_p": 1.0,
        }
        return server.handle_chat_completions(body)["usage"]["completion_tokens"]

    def direct_streamed(number: int = 0) -> int:
        chunks: list = []
        body = {"messages": varied(number), **options, "top_k": 0, "min_p": 0.0, "top_p": 1.0, "stream": True}
        server.handle_chat_completions(body, chunks.append)
        return chunks[-1]["timings"]["predicted_n"]

    def whole(number: int = 0) -> int:
        return client.chat.completions.create(
            model=MODEL, messages=varied(number), **options
        ).usage.completion_tokens

    def read(client, **more) -> int:
        """A stream read to its end by the SDK."""
        usage = {"include_usage": True}
        chunks = client.chat.completions.create(model=MODEL, stream=True, stream_options=usage, **more)
        return [chunk.usage for chunk in chunks if chunk.usage][-1].completion_tokens

    def streamed(number: int = 0) -> int:
        return read(client, messages=varied(number), **options)

    def sdk_streamed(number: int = 0) -> int:
        """The SDK at llama.cpp's own HTTP server: what reading events costs without the gateway."""
        return read(bare, messages=varied(number), extra_body={"top_k": 0, "min_p": 0.0}, **options)

    def varied(number: int) -> list[dict]:
        return [{"role": "user", "content": f"{PROMPT} It is walk number {number}."}]

    def eight(one):
        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(one, range(8)))

    def counted(name, work):
        def run():
            made[name] = work()

        return run

    took = turns(
        rounds,
        direct=counted("direct", direct),
        whole=counted("whole", whole),
        direct_streamed=counted("direct_streamed", direct_streamed),
        streamed=counted("streamed", streamed),
        sdk_streamed=counted("sdk_streamed", sdk_streamed),
        direct8=counted("direct8", lambda: eight(direct)),
        whole8=counted("whole8", lambda: eight(whole)),
        direct_streamed8=counted("direct_streamed8", lambda: eight(direct_streamed)),
        streamed8=counted("streamed8", lambda: eight(streamed)),
        sdk_streamed8=counted("sdk_streamed8", lambda: eight(sdk_streamed)),
    )
    rate = {name: made[name] / seconds for name, seconds in took.items()}
    for side in ("whole", "streamed", "whole8", "streamed8"):
        base = side.replace("whole", "direct").replace("streamed", "direct_streamed")
        note = f"{rate[side]:.0f} and {rate[base]:.0f} tokens/s"
        report(f"gateway and SDK / xllamacpp called directly: {side}", rate[side] / rate[base], note)
    for side in ("streamed", "streamed8"):
        note = f"{rate[side]:.0f} and {rate['sdk_' + side]:.0f} tokens/s"
        report(f"gateway and SDK / SDK at llama.cpp: {side}", rate[side] / rate["sdk_" + side], note)
    report(
        "eight streams / one, through the gateway",
        rate["whole8"] / rate["whole"],
        f"{rate['whole8']:.0f} tokens/s",
    )
    memory(client)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        print("transformers is not installed: left out")
        return
    file = weights.path(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def generate() -> None:
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    both = turns(rounds, ours=counted("ours", whole), theirs=generate)
    ratio = (made["ours"] / both["ours"]) / (TOKENS / both["theirs"])
    report(
        "one stream / transformers generate, bf16",
        ratio,
        f"transformers {TOKENS / both['theirs']:.0f} tokens/s",
    )


def memory(client) -> None:
    import psutil

    client.embeddings.create(model=companion.embedding_model(), input=["warm"] * 64)
    resident = psutil.Process(process.running().pid).memory_info().rss / 2**20
    report("memory of the endpoint, both models loaded / 600 MB", resident / 600, f"{resident:.0f} MB")


def embeddings(rounds: int) -> None:
    """Texts a second, against sentence-transformers with the same weights."""
    from companion import shop

    texts = shop.tickets("train").text.tolist()[:200]
    client = companion.client()

    def ours() -> None:
        texts.append(texts.pop(0))  # what was asked just so before would not be computed again
        client.embeddings.create(model=companion.embedding_model(), input=texts)

    try:
        from sentence_transformers import SentenceTransformer

        theirs = SentenceTransformer(os.environ["MINILM_FOLDER"])
    except (ImportError, KeyError):
        print("set MINILM_FOLDER and install sentence-transformers to compare embeddings")
        took = turns(rounds, ours=ours)
        print(f"embeddings: {len(texts) / took['ours']:.0f} texts/s")
        return
    took = turns(rounds, ours=ours, theirs=lambda: theirs.encode(texts))
    note = f"{len(texts) / took['ours']:.0f} and {len(texts) / took['theirs']:.0f} texts/s"
    report("embeddings / sentence-transformers", took["theirs"] / took["ours"], note)


if __name__ == "__main__":
    main()
