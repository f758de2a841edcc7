"""What training costs, measured side by side in one run; nothing is asserted.

    python tests/benchmarks/training.py [--rounds 3] [--steps 8]    speed, share of the peak, memory
    python tests/benchmarks/training.py --quality                   validation loss after one epoch of each
    python tests/benchmarks/training.py --labels CHECKPOINT         a trained adapter in PEFT and in llama.cpp

The task is Fernway's triage: a ticket in, its intent, urgency and order out as JSON. The other side is trl's
SFTTrainer where trl is installed, on the same tokens with the same adapter, batch size, precision, schedule
and loss, without gradient checkpointing (its default, which trades speed for memory) and otherwise as it is.
The sides are processes of their own and take turns. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from companion import shop
from companion.local import weights

MODEL = "smollm2-135m-instruct"
BATCH = 8
EPOCHS = 3  # that the schedule is made for
KINDS = {
    "loss": ("cross_entropy", "log_softmax", "nll", "argmax"),
    "attention": ("bmm", "softmax", "scaled_dot"),
    "products": ("mm", "linear", "mkl"),
    "optimizer": ("adam",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of each side in a round")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--labels", type=Path, metavar="CHECKPOINT")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in the trainer, for both sides
    with tempfile.TemporaryDirectory() as folder:
        if chosen.labels:
            labels(chosen.labels, Path(folder))
        elif chosen.quality:
            quality(write_job(Path(folder), epochs=1))
        else:
            speed(write_job(Path(folder), epochs=EPOCHS), chosen.rounds, chosen.steps)


def report(what: str, ratio: float, note: str) -> None:
    print(f"{what:58} {ratio:6.2f}   {note}", flush=True)


# --- the task -----------------------------------------------------------------------------------------------


def question(ticket) -> str:
    subject = ticket.subject if isinstance(ticket.subject, str) else ""
    return f"{subject}\n\n{ticket.text}".strip()


def answer(ticket) -> str:
    order = ticket.slots.get("order_id")
    return json.dumps({"intent": ticket.intent, "urgency": ticket.urgency, "order_id": order})


def write_job(folder: Path, epochs: int) -> Path:
    for split in ("train", "validation"):
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": question(ticket)},
                        {"role": "assistant", "content": answer(ticket)},
                    ]
                }
            )
            for ticket in shop.tickets(split).itertuples()
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    job = {
        "job": "benchmark",
        "model": MODEL,
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "n_epochs": epochs,
        "batch_size": BATCH,
        "learning_rate_multiplier": 1.0,
        "seed": 7,
        "early_stopping_patience": None,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder


# --- the sides: each does as many steps as it is sent, and sends back what they took ------------------------


def peak_memory() -> float:
    """Of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kB


def ours(pipe, folder: Path) -> None:
    """Sent 0, it sends the validation loss, then says where its time goes."""
    from companion.local.training.examples import batches
    from companion.local.training.run import Events, Run

    run = Run(folder, Events(folder / "events.jsonl"))

    def train(steps: int) -> dict:
        tokens = useful = 0
        start = time.perf_counter()
        for _ in range(steps):
            epoch, place = divmod(run.step, run.steps_an_epoch)
            order = batches(run.lengths, BATCH, seed=run.job["seed"], epoch=epoch)
            batch = [run.train[number] for number in order[place]]
            run._train_on(batch, epoch + 1)
            tokens += sum(len(example) for example in batch)
            useful += work(batch, run.model)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "useful": useful, "memory": peak_memory()}

    pipe.send(run.total_steps)
    while steps := pipe.recv():
        pipe.send(train(steps))
    loss, _, _, total = run._losses(run.validation, training=False)
    pipe.send(loss / total)
    pipe.send(shares(lambda: train(3)) if run.step + 3 <= run.total_steps else {})


def work(batch, model) -> float:
    """The floating-point operations that a step cannot do without: of the base model forward, and backward to
    activations; of the adapter also to its weights; of attention what lies below the diagonal; of the output
    layer what counts in the loss."""
    config = model.config
    layer = 2 * config.width * config.heads * config.head
    layer += 2 * config.width * config.kv_heads * config.head + 3 * config.width * config.hidden
    adapter = sum(part.a.numel() + part.b.numel() for part in model.parts())
    tokens, squares = sum(map(len, batch)), sum(len(example) ** 2 for example in batch)
    labelled = sum(int((example.weights > 0).sum()) for example in batch)
    return (
        tokens * (4 * layer * config.layers + 6 * adapter)
        + squares * 6 * config.width * config.layers
        + labelled * 4 * config.vocabulary * config.width
    )


def shares(train) -> dict[str, float]:
    """The kinds of operations and their shares of the time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        train()
    spent = {kind: 0.0 for kind in [*KINDS, "elementwise and copies"]}
    for item in found.key_averages():
        kinds = [kind for kind, words in KINDS.items() if any(word in item.key.lower() for word in words)]
        spent[kinds[0] if kinds else "elementwise and copies"] += item.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: part / whole for kind, part in spent.items()}


def theirs(pipe, folder: Path, same_order: bool) -> None:
    """Trains `folder`/base, with our order of examples or its own; at the end it saves `folder`/trl."""
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from companion.local.training.adapter import GROUPS
    from companion.local.training.examples import Encoder, batches
    from companion.local.training.run import LEARNING_RATE, WARM_UP

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    job = json.loads((folder / "job.json").read_text())
    examples = Encoder(weights.path(MODEL)).load(Path(job["train"]))
    order = batches(list(map(len, examples)), BATCH, seed=job["seed"], epoch=0)
    order.sort(key=len, reverse=True)  # the one that is not full comes last
    rows = [
        {
            "input_ids": example.ids.tolist(),
            "labels": [
                id if weight else -100 for id, weight in zip(example.ids, example.weights, strict=True)
            ],
        }
        for example in (examples[number] for batch in order for number in batch)
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    tokens = 0

    class Trainer(SFTTrainer):
        def training_step(self, model, inputs, *more):
            nonlocal tokens
            tokens += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *more)

    class Turns(transformers.TrainerCallback):
        left, seconds = 0, 0.0

        def on_step_begin(self, args, state, control, **more):
            nonlocal tokens
            if not self.left:
                self.left, self.seconds, tokens = pipe.recv(), 0.0, 0
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **more):
            self.seconds += time.perf_counter() - self.began
            self.left -= 1
            if not self.left:
                pipe.send({"seconds": self.seconds, "tokens": tokens, "memory": peak_memory()})

    groups = [names[0].split(".")[1] for group in GROUPS for names in group]
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=job["n_epochs"],
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=WARM_UP,
        seed=job["seed"],
        train_sampling_strategy="sequential" if same_order else "random",
        gradient_checkpointing=False,
        max_length=None,
        use_cpu=True,
        bf16=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=groups, task_type="CAUSAL_LM"),
        callbacks=[Turns()],
    )
    pipe.send(None)
    trainer.train()
    trainer.save_model(str(folder / "trl"))
    pipe.send(None)


class Side:
    """One side in a process of its own."""

    def __init__(self, work, *arguments) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()
        self.ready = self.pipe.recv()

    def __call__(self, steps: int):
        self.pipe.send(steps)
        return self.pipe.recv()

    def close(self) -> None:
        self.process.kill()


def opponent(folder: Path, same_order: bool) -> Side | None:
    try:
        import trl
    except ImportError:
        print("trl is not installed: left out")
        return None
    print(f"trl {trl.__version__}")
    from companion.local.training import adapter
    from companion.local.training.model import Model

    file = weights.path(MODEL)
    adapter.save(Model(file), folder / "nothing", MODEL)  # an adapter begins by changing nothing
    adapter.merge(folder / "nothing", file, folder / "base")
    return Side(theirs, folder, same_order)


# --- figures ------------------------------------------------------------------------------------------------


def speed(folder: Path, rounds: int, steps: int) -> None:
    import torch

    square = torch.randn(2048, 2048, dtype=torch.bfloat16)

    def peak() -> float:
        """Floating-point operations a second of one product."""
        start = time.perf_counter()
        square @ square
        return 2 * 2048**3 / (time.perf_counter() - start)

    sides = {"ours": Side(ours, folder)}
    if other := opponent(folder, same_order=False):
        sides["theirs"] = other
    rates: dict[str, list] = {name: [] for name in sides}
    reached, best, memory = [], 0.0, {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            found = side(steps if number else 2)
            best = max(best, *(peak() for _ in range(5)))
            memory[name] = found["memory"]
            if number:  # the first steps warm up
                rates[name].append(found["tokens"] / found["seconds"])
            if number and name == "ours":
                reached.append(found["useful"] / found["seconds"])
    rate = {name: statistics.median(values) for name, values in rates.items()}
    if other:
        note = f"{rate['ours']:.0f} and {rate['theirs']:.0f} tokens/s"
        report("training / SFTTrainer, real tokens a second", rate["ours"] / rate["theirs"], note)
        report(
            "peak memory / SFTTrainer's",
            memory["ours"] / memory["theirs"],
            f"{memory['theirs']:.2f} GB theirs",
        )
    report("peak memory of training / 3 GB", memory["ours"] / 3, f"{memory['ours']:.2f} GB")
    useful = statistics.median(reached)
    note = f"{useful / 1e9:.0f} of {best / 1e9:.0f} GFLOP/s; {rate['ours']:.0f} tokens/s"
    report("useful work / the machine's bf16 peak", useful / best, note)
    sides["ours"](0)
    for kind, share in sides["ours"].pipe.recv().items():
        report(f"  of the time: {kind}", share, "")
    for side in sides.values():
        side.close()


def quality(folder: Path) -> None:
    """The validation loss of both after one epoch of the same batches, with each adapter in our model."""
    import torch

    side = Side(ours, folder)
    took = side(side.ready)
    mine = side(0)
    print(f"ours: {took['tokens']} tokens in {took['seconds']:.0f} s, validation loss {mine:.4f}", flush=True)
    side.close()
    if other := opponent(folder, same_order=True):
        took = other(side.ready)
        other.pipe.recv()
        model, examples = loaded(folder / "trl", folder / "validation.jsonl")
        total = sum(float(example.weights.sum()) for example in examples)
        with torch.no_grad():
            yours = sum(model.loss([example])[0] for example in examples) / total
        print(f"theirs: {took['tokens']} tokens in {took['seconds']:.0f} s, validation loss {yours:.4f}")
        report("validation loss / SFTTrainer's, one epoch", mine / yours, "")


def loaded(folder: Path, data: Path):
    """Our model with a PEFT adapter, and the examples of a file."""
    import torch
    from safetensors.torch import load_file

    from companion.local.training.examples import Encoder
    from companion.local.training.model import Model

    file = weights.path(MODEL)
    model, tensors = Model(file), load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for part in model.parts():
            name = f"base_model.model.model.layers.{part.layer}.{part.names[0]}"
            part.a.copy_(tensors[f"{name}.lora_A.weight"])
            part.b.copy_(tensors[f"{name}.lora_B.weight"])
    return model, Encoder(file).load(data)


# --- the adapter in its two formats -------------------------------------------------------------------------


def labels(checkpoint: Path, folder: Path) -> None:
    """Greedy answers to the test tickets: PEFT in float32 under transformers, and llama.cpp.

    llama.cpp runs twice: on the base model in float32, which compares the adapter's two formats, and on the
    model as it is served, where llama.cpp also rounds what goes into each product to 8 bits.
    """
    tickets = list(shop.tickets("test").itertuples())
    questions, wanted = [question(ticket) for ticket in tickets], [answer(ticket) for ticket in tickets]
    in_full = in_llama(unquantized(folder), checkpoint, questions)
    served = in_llama(weights.path(MODEL), checkpoint, questions)
    peft = in_peft(checkpoint, questions)
    for where, found in (("in float32", in_full), ("as served", served)):
        for field in ("intent", "urgency", "order_id"):
            values = [[read(text).get(field) for text in texts] for texts in (peft, found, wanted)]
            right = [sum(a == b for a, b in zip(one, values[2], strict=True)) for one in values[:2]]
            same = sum(a == b for a, b in zip(*values[:2], strict=True))
            note = f"of {len(tickets)}; {right[0]} right in PEFT, {right[1]} in llama.cpp"
            report(f"same {field} in PEFT and llama.cpp, {where}", same / len(tickets), note)


def unquantized(folder: Path) -> Path:
    """The base model as a GGUF file in float32."""
    import gguf
    import numpy as np

    reader, target = gguf.GGUFReader(weights.path(MODEL)), folder / "base.gguf"
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, numbers.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def read(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def in_llama(base: Path, checkpoint: Path, questions: list[str]) -> list[str]:
    import httpx

    from companion.local.engine import Engine

    engine = Engine(base, MODEL, "chat", [checkpoint / "adapter.gguf"], key="key")

    def ask(text: str) -> str:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 64}
        reply = httpx.post(
            f"{engine.address}/v1/chat/completions", json=body, headers=engine.headers, timeout=600
        )
        return reply.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, questions))


def in_peft(checkpoint: Path, questions: list[str]) -> list[str]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = weights.path(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    texts = []
    for start in range(0, len(questions), 12):
        chats = [[{"role": "user", "content": text}] for text in questions[start : start + 12]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        texts += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    main()
