"""From a folder of submissions to who submitted what: layouts, odd names, duplicates.

nbgrader's layout is read (`submitted/<learner>/<exercise>/….ipynb`), and so are flat files
(`<learner>_<exercise>.ipynb`) and what Canvas and Moodle give when submissions are downloaded. Names are what
learners chose: they are shown and compared, and never used as a path. Links are not followed.
"""

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

DEEPEST = 6  # folders between the submissions' folder and a notebook
_NOTEBOOK = re.compile(r"\.ipynb(\.txt|\.json)?$", re.I)  # browsers add the second ending
_COPY_OF = re.compile(r"^(copy of|kopie von|copie de|copia de)[\W_]+", re.I)
_COPY = re.compile(
    r"v?\d{1,3}|(copy|kopie|copie|copia|final|fixed|neu|new)\d*"
)  # words after an exercise's name
_CANVAS = re.compile(r"([^_]+)(?:_LATE)?_(\d{2,})_\d{2,}(?:_|$)", re.I)
_MOODLE = re.compile(r"(.+?)_(\d+)_assignsubmission_[a-z]+", re.I)


@dataclass(frozen=True)
class Submission:
    """What one learner submitted for one exercise.

    learner: unique to the learner, safe to show, not safe as a file's name: see `safe_name`.
    exercise: its name; "" where the file's name does not say it: `restore.recognise` tells by the content.
    path: the notebook that counts; None where there is none, and the notes say why.
    lms_id: the number by which Canvas or Moodle know the learner, if the name holds it.
    others: notebooks that do not count, the newest first.
    notes: what an instructor should know, in sentences.
    """

    learner: str
    exercise: str
    path: Path | None
    lms_id: str = ""
    others: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def collect(folder: Path, exercises: Collection[str] = ()) -> list[Submission]:
    """The submissions in a folder, sorted by learner and exercise; of duplicates the newest file counts.

    exercises: the names that exercises have. Without them a flat file's name is cut at its first `_`.

    Raises ValueError where the folder is none, or holds no submission.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that holds the submissions")
    if (root / "submitted").is_dir() and not (root / "submitted").is_symlink():
        root = root / "submitted"
    files: dict[tuple[str, str, str], list[Path]] = {}
    notes: dict[tuple[str, str, str], list[str]] = {}
    empty: dict[tuple[str, str, str], str] = {}
    for path, kind, note in sorted(_walk(root)):
        key = _who(path.relative_to(root), exercises)
        files.setdefault(key, []).extend([path] if kind == "notebook" else [])
        notes.setdefault(key, []).extend([note] if kind == "refused" else [])
        if kind == "empty":
            empty.setdefault(key, note)
    submitted = {learner for (learner, *_), paths in files.items() if paths}
    found = []
    for key in sorted(files):
        learner, exercise, lms_id = key
        newest, *others = sorted(files[key], key=_age, reverse=True) or [None]
        said = list(notes[key])
        if newest is None and not said:
            if not exercise and learner in submitted:
                continue  # a folder of something else beside the notebooks
            said.append(empty[key])
        if others:
            name = _shown(str(newest.relative_to(root)))
            said.append(f"{len(files[key])} notebooks were submitted; the newest counts, {name}.")
        found.append(Submission(learner, exercise, newest, lms_id, tuple(others), tuple(said)))
    if not found:
        raise ValueError(f"{folder} holds no submission: notebooks are looked for in <learner>/<exercise>/")
    return found


def read(path: Path, most: int) -> bytes:
    """A submission's content, but at most its first `most` + 1 bytes: whoever reads sees that there are more.

    Raises OSError where it cannot be read, or is no file of its own: a link, a pipe.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(f"{_shown(path.name)} is not a file")
    with path.open("rb") as file:
        return file.read(most + 1)


def safe_name(learner: str) -> str:
    """A name for a learner's files that no other learner's have, on any file system.

    Small letters, digits and - or _ are kept; of anything else a readable part is left, and a hash added.
    """
    plain = re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", learner)
    reserved = re.fullmatch(r"con|prn|aux|nul|(com|lpt)\d", learner)  # names that Windows keeps for devices
    if plain and not reserved and not re.search(r"-[0-9a-f]{12}$", learner):
        return learner
    ascii_part = unicodedata.normalize("NFKD", learner).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_part).strip("-")[:40].strip("-") or "learner"
    return f"{slug}-{hashlib.sha256(learner.encode('utf-8', 'backslashreplace')).hexdigest()[:12]}"


def csv_cell(text: str) -> str:
    """A text that a spreadsheet will not take for a formula: with a ' before it, if it begins like one.

    https://owasp.org/www-community/attacks/CSV_Injection
    """
    text = text.replace("\0", "")
    plain = unicodedata.normalize("NFKC", text).lstrip(" \n\u200b\ufeff")  # a wide = counts as =
    return f"'{text}" if plain.startswith(("=", "+", "-", "@", "\t", "\r", "|", "%")) else text


def _walk(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Whatever is somebody's: a notebook, what is refused, an empty folder; the last two with the reason."""
    for parent, folders, names in os.walk(root):
        here = Path(parent)
        depth = len(here.relative_to(root).parts)
        notebooks = []
        for name in sorted(name for name in [*folders, *names] if not _is_hidden(name)):
            path = here / name
            if name not in folders and not _NOTEBOOK.search(name):
                continue
            if path.is_symlink():
                yield path, "refused", f"{_shown(name)} is a link; links are not followed."
            elif name in names and not stat.S_ISREG(path.lstat().st_mode):
                yield path, "refused", f"{_shown(name)} is not a file."
            elif name in names:
                yield path, "notebook", ""
            else:
                continue
            notebooks.append(name)
        folders[:] = [name for name in folders if not _is_hidden(name) and depth < DEEPEST]
        if depth and not folders and not notebooks:
            there = ", ".join(_shown(name) for name in sorted(names)[:3]) or "nothing"
            yield here, "empty", f"There is no notebook, but {there}."


def _is_hidden(name: str) -> bool:
    # Not all that begins with a dot: a learner may be called so.
    return name.startswith("._") or name in (".ipynb_checkpoints", ".git", "__MACOSX")


def _who(path: Path, exercises: Collection[str]) -> tuple[str, str, str]:
    """Learner, exercise, and the learner's number in the LMS, by a path from the submissions' folder."""
    *folders, last = map(_shown, path.parts)
    if not _NOTEBOOK.search(last):
        folders, last = [*folders, last], ""
    stem = _COPY_OF.sub("", _NOTEBOOK.sub("", last))
    rest, exercise = _cut(stem, exercises)
    if folders:
        learner, lms_id = _lms(folders[0])
        if len(folders) > 1:
            exercise = _cut(folders[1], exercises)[1] or exercise
        if not exercise and not exercises:
            exercise = folders[1] if len(folders) > 1 else stem
        return learner, exercise, lms_id
    learner, lms_id = _lms(rest or stem)
    if not exercise and not exercises and not lms_id:
        learner, _, exercise = stem.partition("_")
    return learner, exercise, lms_id


def _cut(stem: str, exercises: Collection[str]) -> tuple[str, str]:
    """What stands before an exercise's name at the end of a file's name, and the exercise; or all, and ""."""
    found = list(re.finditer(r"[^\W_]+", stem))
    words = [word[0].casefold() for word in found]
    for exercise in sorted(exercises, key=lambda name: (-len(name), name)):
        wanted = [word.casefold() for word in re.findall(r"[^\W_]+", exercise)]
        for end in range(len(words), len(wanted) - 1, -1):
            start = end - len(wanted)
            if words[start:end] == wanted:
                return stem[: found[start].start()].rstrip(" _-.("), exercise
            if not _COPY.fullmatch(words[end - 1]):
                break
    return stem, ""


def moodle_folder(path: str) -> str:
    """The folder by which Moodle knows whose feedback a file is, if a submission's path holds it."""
    found = (_MOODLE.match(part) for part in path.split("/"))
    return next((f"{match[0]}_" for match in found if match), "")


def _lms(text: str) -> tuple[str, str]:
    """A learner and their number in the LMS, out of what Moodle or Canvas make of them."""
    found = _MOODLE.match(text) or _CANVAS.match(text)
    return (f"{found[1]} ({found[2]})", found[2]) if found else (text, "")


def _shown(name: str) -> str:
    """A name as it can be shown and written, in the one of Unicode's spellings that is composed."""
    text = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
    joiners = "\u200c\u200d"  # letters of some scripts are joined by them
    return "".join(
        c if c.isprintable() or c in joiners else c.encode("unicode_escape").decode() for c in text
    )


def _age(path: Path) -> tuple[int, str]:
    return (path.lstat().st_mtime_ns, str(path))
