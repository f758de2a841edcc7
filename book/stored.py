"""What the pages show before the model is loaded, and where it cannot run: real runs, in `book/stored.json`.

`python book/stored.py` makes that file anew, in a few minutes, with the course's own model: the
probabilities come from llama.cpp over the whole vocabulary, the attention from the same weights in
transformers, the replies from the local endpoint. The fine-tuned model is chapter 8's; it is trained first
where it is not there. OpenAI's tokens are those of the package in `book/vendor.json`, which the page uses,
too.
"""

import base64
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import companion
from companion import dataset, finetuning, shop
from companion.local import weights
from companion.widgets import token_view

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK / "_ext"))
import vendor  # noqa: E402

MODEL = "smollm2-135m-instruct"
TEMPERATURES = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
BEGINNINGS = [
    "Thank you for your order. Your parcel will",
    "Dear customer, we are sorry that your",
    "The capital of France is",
    "The tent leaked in the rain, so",
]
KEPT, BRANCHES, DEPTH = 12, 5, 2  # candidates shown, those that can be followed, and how far
TEXTS = [
    "Thank you for your order FW-10234. Your parcel will arrive tomorrow.",
    "Rucksack, Regenhülle und Zelt: alles in bester Ordnung!",
    "the   strap broke after 3 days :( refund pls",
    "def total(items): return sum(i.price for i in items)",
]
LETTERS = [3, 12, 30, 47, 64, 90]  # of the test tickets
SENTENCE = "The parcel that we sent to Anna on Monday was lost, so she wants a new one."


def candidates(server, text):
    """The likeliest tokens after `text`, and the log of the sum over all tokens at each temperature."""
    answer = server.handle_completions(
        {"prompt": text, "n_predict": 1, "temperature": 1, "n_probs": 49152, "cache_prompt": False}
    )
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logs = [one["logprob"] for one in found if one["logprob"] > -80]
    sums = [math.log(sum(math.exp(one / t) for one in logs)) for t in TEMPERATURES]
    return [(one["token"], round(one["logprob"], 3)) for one in found[:KEPT]], [round(one, 3) for one in sums]


def explorer():
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights.path(MODEL))
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)

    def grow(text, depth):
        likely, sums = candidates(server, text)
        node = {"tokens": likely, "sums": sums}
        if depth:
            node["next"] = [grow(text + token, depth - 1) for token, _ in likely[:BRANCHES]]
        return node

    return {
        "temperatures": TEMPERATURES,
        "beginnings": [{"text": text, **grow(text, DEPTH)} for text in BEGINNINGS],
    }


def openai_tokens(texts):
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "o200k.js"
        script.write_bytes(vendor.read("gpt-tokenizer", "dist/o200k_base.js"))
        code = (
            "const t = require(process.argv[1]);"
            "const texts = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
            "console.log(JSON.stringify(texts.map(x => t.encode(x).map(i => t.decode([i])))))"
        )
        run = subprocess.run(
            [*vendor.node(), "-e", code, str(script)],
            input=json.dumps(texts), capture_output=True, text=True, encoding="utf-8", check=True,
        )  # fmt: skip
    return json.loads(run.stdout)


def tokens():
    pairs = zip(TEXTS, openai_tokens(TEXTS), strict=True)
    return [
        {"text": text, "smollm2": list(token_view(text).tokens), "openai": theirs} for text, theirs in pairs
    ]


def chat():
    examples = [dataset.from_tickets(shop.tickets(split)) for split in ("train", "validation", "test")]
    job = finetuning.fine_tune(
        *examples[:2], suffix="triage", n_epochs=1, batch_size=4,
        learning_rate_multiplier=2, seed=7, reuse=True,
    )  # fmt: skip
    tuned = finetuning.follow(job, plot=False).fine_tuned_model
    client = companion.client()

    def reply(model, text):
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=80
        )
        return answer.choices[0].message.content

    rows = []
    for number in LETTERS:
        letter, right = (message["content"] for message in examples[2][number]["messages"])
        rows.append(
            {"letter": letter, "base": reply(MODEL, letter), "tuned": reply(tuned, letter), "right": right}
        )
    return rows


def attention():
    """The weights of a sentence's tokens by layer, head and row, a byte from 0 to 255 each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = weights.path(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, attn_implementation="eager"
    )
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = model(ids, output_attentions=True).attentions
    packed = bytearray()
    for head in (head for layer in layers for head in layer[0]):
        for row, values in enumerate(head):
            packed += bytes(round(255 * float(value)) for value in values[: row + 1])
    return {
        "tokens": [tokenizer.decode([i]) for i in ids[0]],
        "layers": len(layers),
        "heads": layers[0].shape[1],
        "weights": base64.b64encode(bytes(packed)).decode(),
    }


def main():
    parts = {"explorer": explorer, "tokens": tokens, "chat": chat, "attention": attention}
    made = {"made": "by book/stored.py, with SmolLM2-135M-Instruct, Q4_1"}
    for name, make in parts.items():
        made[name] = make()
        print(name, len(json.dumps(made[name])), "characters")
    (BOOK / "stored.json").write_text(
        json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
