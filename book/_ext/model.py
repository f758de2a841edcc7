"""The models that run in the page: the course's own, and chapter 8's where it was trained on this machine.

Each is cut into parts that any web server can hand out and a browser can keep one by one. The parts lie
under the companion's home and are linked into the book, so that a build does not copy them. The fine-tuned
model is the base with its adapter added to the weights.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from companion.local import weights

NAME = "smollm2-135m-instruct"
PART = 20 << 20  # bytes
CUT, MERGED = "page-parts", "page-models"  # folders in the companion's home


def place(out: Path) -> dict[str, dict]:
    """Put the parts of the models into the folder `out`, and say which: version, size in bytes, names.

    Raises `weights.WeightsError` where the model is not here and cannot be fetched.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = weights.path(NAME)
    files = {"base": base}
    if tuned := merged(base):
        files["tuned"] = tuned
    listed = {}
    for name, file in files.items():
        folder = cut(file)
        parts = sorted(folder.iterdir())
        for part in parts:
            link(part, out / f"{name}-{part.name}")
        listed[name] = {
            "version": folder.name,
            "size": file.stat().st_size,
            "parts": [f"{name}-{part.name}" for part in parts],
        }
    return listed


def cut(file: Path) -> Path:
    """The folder with the parts of a file, made where it is not there."""
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()[:16]
    folder = weights.home() / CUT / digest
    if sum(part.stat().st_size for part in folder.glob("*")) != file.stat().st_size:
        with fresh(folder) as new, file.open("rb") as data:
            number = 0
            while block := data.read(PART):
                number += 1
                (new / f"{number:02}.part").write_bytes(block)
    return folder


class fresh:
    """A new folder that takes the place of `folder` when it is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.new = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=".new-"))
        return self.new

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.new.chmod(0o755)
            self.new.rename(self.folder)
        else:
            shutil.rmtree(self.new, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """A second name for the same file; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def merged(base: Path) -> Path | None:
    """The newest model that chapter 8 fine-tuned on this machine, as one GGUF file; None without one."""
    if not (weights.home() / "endpoint.sqlite3").is_file():
        return None
    from companion.local.store import Store

    store = Store()
    try:
        names = [model["id"] for model in store.models() if ":triage:" in model["id"]]
        adapter = store.model(names[-1]).adapter if names else None
    finally:
        store.close()
    if adapter is None or not adapter.is_file():
        return None
    with adapter.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()[:16]
    folder = weights.home() / MERGED / digest
    file = folder / "tuned.gguf"
    if not file.is_file():
        with fresh(folder) as new:
            merge(base, adapter, new / "tuned.gguf")
    return file


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write the base model with the adapter's change added to its weights.

    What changes is written in 8 bits: in the base's 4 the rounding is larger than most of the change.
    """
    import gguf
    import numpy as np

    model, change = gguf.GGUFReader(base), gguf.GGUFReader(adapter)
    low = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in change.tensors}
    alpha = float(change.fields["adapter.lora.alpha"].contents())
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in model.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
    for tensor in model.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if f"{tensor.name}.lora_a" in low:
            a, b = low[f"{tensor.name}.lora_a"], low[f"{tensor.name}.lora_b"]
            whole = gguf.quants.dequantize(data, tensor.tensor_type) + alpha / len(a) * (b @ a)
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(whole.astype(np.float32), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
