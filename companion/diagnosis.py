"""What `companion doctor` looks at: versions, packages, models, disk, the endpoint. It changes nothing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

NEEDED_MB = 350  # both models, and the download of the larger one beside them


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is good, what was found, and how to mend it."""

    good: bool
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"ok       {self.what}" if self.good else f"missing  {self.what}: {self.mend}"


def examine() -> list[Finding]:
    """All findings, in the order in which one would mend them."""
    return [finding for look in LOOKS for finding in look()]


def _python() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    return [Finding(sys.version_info >= (3, 11), f"Python {version}", "install Python 3.11 or newer")]


def _packages() -> list[Finding]:
    """What the extras bring, and the pins that the chapters' outputs rest on."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("companion") or ()]
    except metadata.PackageNotFoundError:
        return [Finding(False, "the package itself", "run `pip install -e '.[all]'` in the clone")]
    found = []
    for extra in ("", "train", "book", "test"):
        wrong = []
        for requirement in requirements:
            marker = requirement.marker
            if requirement.name == "companion" or (marker is None) != (extra == ""):
                continue
            if marker and not marker.evaluate({"extra": extra}):
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                wrong.append(f"{requirement.name} is not installed")
                continue
            if (
                not requirement.specifier.contains(version, prereleases=True)
                and version.split("+")[0] not in requirement.specifier
            ):
                wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
        name = f"packages of extra '{extra}'" if extra else "packages"
        install = f"run `pip install -e '.[{extra}]'`" if extra else "run `pip install -e .`"
        found.append(Finding(not wrong, f"{name}{': ' if wrong else ''}{', '.join(wrong)}", install))
    return found


def _models() -> list[Finding]:
    from companion.local import weights

    found = []
    for name, entry in weights.MODELS.items():
        folder = os.environ.get("COMPANION_MODEL_PATH")
        file = (weights.Path(folder).expanduser() if folder else weights.home() / "models") / entry.file
        if not file.is_file():
            mend = (
                f"copy {entry.file} there" if folder else "run `companion pull`, or set COMPANION_MODEL_PATH"
            )
            found.append(Finding(False, f"model {name} at {file}", mend))
        else:
            good = weights._sha256(file) == entry.sha256
            found.append(
                Finding(good, f"model {name} at {file}", "it is altered: delete it and run `companion pull`")
            )
    return found


def _disk() -> list[Finding]:
    from companion.local import weights

    folder = weights.home()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free // 10**6
    good = os.access(folder, os.W_OK) and free > NEEDED_MB
    return [
        Finding(
            good,
            f"{free} MB free for {weights.home()}",
            "make room, or set COMPANION_HOME to a folder that can be written",
        )
    ]


def _endpoint() -> list[Finding]:
    from companion import backend
    from companion.local import process

    if not backend.is_local():
        named = [
            name for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL") if os.environ.get(name)
        ]
        return [
            Finding(
                "OPENAI_API_KEY" in named,
                f"hosted backend, with {', '.join(named) or 'nothing set'}",
                "set OPENAI_API_KEY",
            )
        ]
    endpoint = process.running()
    return [
        Finding(
            True,
            f"endpoint runs at {endpoint.base_url}"
            if endpoint
            else "no endpoint runs; `client()` starts one",
        )
    ]


LOOKS: tuple[Callable[[], list[Finding]], ...] = (_python, _packages, _models, _disk, _endpoint)
