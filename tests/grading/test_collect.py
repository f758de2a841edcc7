"""Whose is which file, whatever it is called, and never anything outside the folder."""

import csv
import io
import os
import sys
import unicodedata

import pytest

from companion.grading.collect import DEEPEST, collect, csv_cell, read, safe_name

EXERCISES = ("01_what_is_chatgpt", "03_pretraining", "03_pretraining_1", "05_2024_review")


@pytest.fixture
def put(tmp_path):
    """Write a file below the folder of submissions, so many seconds after another."""
    (tmp_path / "subs").mkdir()

    def make(name, age=0, content="{}"):
        file = tmp_path / "subs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        os.utime(file, (1_700_000_000 - age, 1_700_000_000 - age))
        return file

    make.folder = tmp_path / "subs"
    return make


def who(folder, exercises=EXERCISES):
    return [(found.learner, found.exercise) for found in collect(folder, exercises)]


@pytest.mark.parametrize("below", ["", "submitted/"])
def test_nbgraders_layout_is_read_whatever_the_notebook_is_called(put, below):
    file = put(f"{below}ada/01_what_is_chatgpt/homework final.ipynb")
    put(f"{below}bob/01_what_is_chatgpt/deep/er/x.IPYNB")
    put(f"{below}bob/03_pretraining/03_pretraining.ipynb.txt")
    assert who(put.folder) == [
        ("ada", "01_what_is_chatgpt"),
        ("bob", "01_what_is_chatgpt"),
        ("bob", "03_pretraining"),
    ]
    assert collect(put.folder)[0].path == file


@pytest.mark.parametrize(
    ("name", "learner", "exercise", "lms_id"),
    [
        ("ada_01_what_is_chatgpt", "ada", "01_what_is_chatgpt", ""),
        ("Ada_von_Love lace_01_What-is ChatGPT", "Ada_von_Love lace", "01_what_is_chatgpt", ""),
        ("Copy of ada_03_pretraining", "ada", "03_pretraining", ""),
        ("ada_03_pretraining-Copy1", "ada", "03_pretraining", ""),
        ("ada_03_pretraining (2)", "ada", "03_pretraining", ""),
        ("ada_03_pretraining_final_v2", "ada", "03_pretraining", ""),
        ("ada_03_pretraining_1", "ada", "03_pretraining_1", ""),
        ("ada_05_2024_review", "ada", "05_2024_review", ""),
        ("=cmd|'!A1_03_pretraining", "=cmd|'!A1", "03_pretraining", ""),
        ("..%2f..%2fetc_03_pretraining", "..%2f..%2fetc", "03_pretraining", ""),
        ("john_smith_homework", "john_smith_homework", "", ""),
        ("03_pretraining", "03_pretraining", "03_pretraining", ""),
        ("lovelaceada_1234_56789_01_what_is_chatgpt-1", "lovelaceada (1234)", "01_what_is_chatgpt", "1234"),
        ("lovelaceada_LATE_1234_56789_03_pretraining", "lovelaceada (1234)", "03_pretraining", "1234"),
        ("lovelaceada_1234_56789_homework", "lovelaceada (1234)", "", "1234"),
        (
            "Ada Löve_77_assignsubmission_file_03_pretraining",
            "Ada Löve (77)",
            "03_pretraining",
            "77",
        ),
    ],
)
def test_flat_names_are_taken_apart(put, name, learner, exercise, lms_id):
    put(f"{name}.ipynb")
    [found] = collect(put.folder, EXERCISES)
    assert (found.learner, found.exercise, found.lms_id) == (learner, exercise, lms_id)


def test_moodles_folders_are_read(put):
    put("Ada Löve_77_assignsubmission_file_/my notebook.ipynb")
    put("Bob_78_assignsubmission_file_/03_pretraining.ipynb")
    found = collect(put.folder, EXERCISES)
    assert [(f.learner, f.exercise, f.lms_id) for f in found] == [
        ("Ada Löve (77)", "", "77"),
        ("Bob (78)", "03_pretraining", "78"),
    ]


def test_learners_of_one_name_and_unknown_exercises_are_not_mixed_up(put):
    put("smithjohn_1234_11_03_pretraining.ipynb")
    put("smithjohn_1235_12_03_pretraining.ipynb")
    put("john_smith_hw.ipynb")
    put("john_doe_hw.ipynb")
    assert len(collect(put.folder, EXERCISES)) == 4


def test_without_known_exercises_names_are_cut_at_the_first_underscore(put):
    put("ada_01_what.ipynb")
    put("bob/some exercise/x.ipynb")
    put("eve/ex2.ipynb")
    assert who(put.folder, ()) == [("ada", "01_what"), ("bob", "some exercise"), ("eve", "ex2")]


def test_of_several_notebooks_the_newest_counts_and_a_note_says_so(put):
    old = put("ada/03_pretraining/b.ipynb", age=60)
    new = put("ada/03_pretraining/a.ipynb", age=30)
    oldest = put("ada/03_pretraining/c.ipynb", age=90)
    [found] = collect(put.folder, EXERCISES)
    assert found.path == new and found.others == (old, oldest)
    assert found.notes == ("3 notebooks were submitted; the newest counts, ada/03_pretraining/a.ipynb.",)


def test_a_name_in_two_spellings_of_unicode_is_one_learner(put):
    put(unicodedata.normalize("NFC", "Jürgen") + "_03_pretraining.ipynb", age=9)
    new = put(unicodedata.normalize("NFD", "Jürgen") + "_03_pretraining.ipynb")
    [found] = collect(put.folder, EXERCISES)
    assert found.learner == unicodedata.normalize("NFC", "Jürgen")
    assert found.path == new and found.notes


def test_nothing_hidden_is_taken(put):
    put("ada/03_pretraining/.ipynb_checkpoints/03_pretraining-checkpoint.ipynb")
    put("ada/03_pretraining/03_pretraining.ipynb")
    put("__MACOSX/ada/03_pretraining/._03_pretraining.ipynb")
    put("._ada_03_pretraining.ipynb")
    put("gradebook.db")
    [found] = collect(put.folder, EXERCISES)
    assert found.path.name == "03_pretraining.ipynb" and found.others == () and found.notes == ()


def test_folders_without_a_notebook_are_reported(put):
    put("ada/03_pretraining/answers.html")
    (put.folder / "bob").mkdir()
    put("eve/03_pretraining/eve.ipynb")
    put("eve/03_pretraining/data/numbers.csv")
    put("eve/pictures/me.png")
    ada, bob, eve = collect(put.folder, EXERCISES)
    assert (ada.learner, ada.exercise, ada.path) == ("ada", "03_pretraining", None)
    assert ada.notes == ("There is no notebook, but answers.html.",)
    assert (bob.learner, bob.path, bob.notes) == ("bob", None, ("There is no notebook, but nothing.",))
    assert eve.path.name == "eve.ipynb" and eve.notes == ()


def test_links_are_reported_and_not_followed(put, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.ipynb").write_text("secret")
    target = tmp_path / "secret" / "key.ipynb"
    (put("ada/03_pretraining/other.txt").parent / "03_pretraining.ipynb").symlink_to(target)
    (put.folder / "bob_03_pretraining.ipynb").symlink_to(target)
    (put.folder / "eve").symlink_to(tmp_path / "secret")
    put("fay/03_pretraining/fay.ipynb")
    (put.folder / "fay" / "03_pretraining" / "again").symlink_to(put.folder)
    found = collect(put.folder, EXERCISES)
    assert [(f.learner, f.path is None) for f in found] == [
        ("ada", True),
        ("bob", True),
        ("eve", True),
        ("fay", False),
    ]
    assert all("links are not followed" in note for f in found for note in f.notes)
    assert all(f.notes for f in found)
    with pytest.raises(OSError, match="not a file"):
        read(put.folder / "bob_03_pretraining.ipynb", 9)


def test_pipes_are_refused_without_opening_them(put):
    os.mkfifo(put.folder / "ada_03_pretraining.ipynb")
    [found] = collect(put.folder, EXERCISES)
    assert found.path is None and found.notes == ("ada_03_pretraining.ipynb is not a file.",)
    with pytest.raises(OSError, match="not a file"):
        read(put.folder / "ada_03_pretraining.ipynb", 9)


def test_reading_stops_after_one_byte_too_many(put):
    file = put("ada_03_pretraining.ipynb", content="x" * 100)
    assert read(file, 10) == b"x" * 11 and len(read(file, 100)) == 100


def test_folders_deeper_than_anyone_needs_are_not_entered(put):
    put("ada/" + "x/" * (DEEPEST + 1) + "a.ipynb")
    put("bob/" + "x/" * (DEEPEST - 1) + "a.ipynb")
    ada, bob = collect(put.folder, EXERCISES)
    assert ada.path is None and bob.path is not None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_are_shown_and_kept_apart(put):
    for raw in (b"J\xfcrgen", b"J\xf6rgen", b"new\nline", "\u202eevil".encode()):
        os.mkdir(os.fsencode(put.folder) + b"/" + raw)
        with open(os.fsencode(put.folder) + b"/" + raw + b"/03_pretraining.ipynb", "w") as file:
            file.write("{}")
    found = collect(put.folder, EXERCISES)
    assert [f.learner for f in found] == [r"J\xf6rgen", r"J\xfcrgen", r"\u202eevil", r"new\nline"]
    assert all(f.path.exists() for f in found)


def test_hostile_names_do_not_slow_the_cut_down(put):
    put("01_" * 60 + "x_" * 20 + ".ipynb")
    put("_" * 200 + ".ipynb")
    assert len(collect(put.folder, EXERCISES)) == 2


def test_the_order_is_always_the_same(put):
    for name in ("eve_03_pretraining", "ada_03_pretraining", "ada_01_what_is_chatgpt"):
        put(f"{name}.ipynb")
    assert collect(put.folder, EXERCISES) == sorted(collect(put.folder, EXERCISES), key=lambda f: f.path)


def test_no_folder_and_an_empty_one_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="is no folder: name the one"):
        collect(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no submission"):
        collect(tmp_path)


NAMES = [
    "Ada Lovelace",
    "ada-lovelace",
    "ada lovelace",
    "ada/lovelace",
    "Ada",
    "ADA",
    "../ada",
    "../../etc/passwd",
    "..",
    ".",
    "",
    "=cmd|'/c calc'!A1",
    "Jürgen Größe",
    "Jurgen Grosse",
    "王小明",
    "con",
    "lpt1",
    "a\\b",
    "a:b",
    "a.",
    "a ",
    "x" * 300,
    "x" * 301,
    "\ud800",
    "a\0b",
    "-rf",
]


def test_safe_names_are_names_of_files_and_differ():
    made = [safe_name(name) for name in NAMES]
    assert len(set(made)) == len(NAMES)
    for name in made:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and 0 < len(name) <= 64
        assert not name.startswith("-") and name not in ("con", "lpt1")


def test_plain_names_stay_and_a_made_name_cannot_be_taken():
    assert safe_name("ada") == "ada" and safe_name("s123_b-c") == "s123_b-c"
    made = safe_name("Ada")
    assert made.startswith("ada-") and safe_name(made) != made


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", "＝1+1", "\0=1", "\ufeff=1"]
)
def test_what_a_spreadsheet_would_run_gets_a_quote_before_it(text):
    written = io.StringIO()
    csv.writer(written).writerow([csv_cell(text), "x"])
    [[cell, _]] = csv.reader(io.StringIO(written.getvalue(), newline=""))
    assert cell.startswith("'") and "\0" not in cell


@pytest.mark.parametrize("text", ["Ada", "O'Neill", "a=b", "x-1", "", "Jürgen, Größe", "3 + 4"])
def test_other_texts_stay(text):
    assert csv_cell(text) == text
