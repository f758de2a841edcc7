import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from disks import fill, make_read_only, small_disk
from scripted import MODEL, Client

from companion import retrieval
from companion.retrieval import Index

DOCUMENTS = [
    {
        "id": "returns",
        "title": "Returns",
        "text": "Boots go back within thirty days.\n\nTents go back unused.",
    },
    {
        "id": "shipping",
        "title": "Shipping",
        "text": "A parcel takes three days.\n\nBoots ship in a box of their own.",
    },
    {"id": "repair", "title": "Repair", "text": "A torn tent is sewn by hand. A tent pole is replaced."},
]


def build(documents=DOCUMENTS, **arguments):
    arguments = {"method": "bm25", "model": MODEL, "client": Client(), **arguments}
    return Index(documents, **arguments)


def texts(text, chunk_words=120, title="Title"):
    return [
        chunk.text
        for chunk in build([{"id": "a", "title": title, "text": text}], chunk_words=chunk_words).chunks
    ]


# Chunks


def test_paragraphs_are_joined_up_to_the_chunk_size():
    assert texts("a b c\n\nd e\n\nf g\n\nh", chunk_words=5) == ["a b c\n\nd e", "f g\n\nh"]


def test_a_long_paragraph_is_cut_and_no_word_is_lost():
    words = [f"w{i}" for i in range(23)]
    chunks = texts(f"first\n\n{' '.join(words)}\n\nlast", chunk_words=10)
    assert " ".join(chunks).split() == ["first", *words, "last"]
    assert max(len(chunk.split()) for chunk in chunks) == 10


def test_every_chunk_carries_the_headings_above_it():
    text = "intro\n# Boots\n## Sizes\none\n\ntwo\n## Care ##\nthree\n# Tents\nfour"
    assert texts(text, chunk_words=1) == [
        "intro",
        "Boots > Sizes\n\none",
        "Boots > Sizes\n\ntwo",
        "Boots > Care\n\nthree",
        "Tents\n\nfour",
    ]


def test_a_heading_that_repeats_the_title_is_not_carried():
    assert texts("# Boots\n## Sizes\none", title="Boots") == ["Sizes\n\none"]


def test_lines_of_a_short_paragraph_stay_lines():
    assert texts("- one\n- two") == ["- one\n- two"]


# Search


def test_bm25_scores_as_the_formula_does_by_hand():
    index = build([{"id": "a", "title": "x", "text": "tent tent"}, {"id": "b", "title": "x", "text": "boot"}])
    (hit,) = index.search("Tent")
    rarity = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    length = 3 / 2.5
    assert hit.id == "a"
    assert hit.score == pytest.approx(rarity * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * length)))


def test_bm25_finds_only_chunks_that_share_a_word():
    assert {hit.id for hit in build().search("boots")} == {"returns", "shipping"}
    assert build().search("kayak") == []


def test_bm25_reads_titles_and_headings():
    index = build([{"id": "a", "title": "Kayaks", "text": "# Paddles\nnone"}, *DOCUMENTS])
    assert [hit.id for hit in index.search("kayaks")] == ["a"]
    assert [hit.id for hit in index.search("PADDLES?")] == ["a"]


def test_bm25_parameters_change_the_scores_as_they_say():
    documents = [{"id": "a", "title": "x", "text": "tent " * 9}, {"id": "b", "title": "x", "text": "tent"}]
    counted_once = build(documents, k1=0).search("tent")
    assert counted_once[0].score == counted_once[1].score
    assert [hit.id for hit in build(documents, b=0).search("tent")] == ["a", "b"]
    padded = [
        {"id": "a", "title": "x", "text": "tent" + " word" * 30},
        {"id": "b", "title": "x", "text": "tent"},
    ]
    assert [hit.id for hit in build(padded, b=1).search("tent")] == ["b", "a"]


def test_embeddings_score_by_cosine():
    index = build(method="embeddings")
    hits = index.search("A parcel takes three days.", k=99)
    assert hits[0].id == "shipping"
    assert len(hits) == len(index)
    assert all(-1 <= hit.score <= 1 for hit in hits)
    own = index.search(f"{hits[0].title}\n{hits[0].text}", k=1)[0]
    assert own.score == pytest.approx(1, abs=1e-5)


def test_embeddings_are_asked_for_in_batches_and_put_in_order(monkeypatch):
    whole = build(method="embeddings").search("boots in a box", k=3)
    monkeypatch.setattr(retrieval, "_BATCH", 2)
    client = Client()
    index = build(method="embeddings", client=client)
    assert [len(batch) for batch in client.embedded] == [2, 1]
    assert index.search("boots in a box", k=3) == whole


def test_bm25_needs_no_embeddings():
    client = Client()
    build(client=client).search("boots")
    assert client.embedded == []


@pytest.mark.parametrize("rrf_k", [60, 1])
def test_hybrid_adds_reciprocal_ranks(rrf_k):
    query = "boots in a box"
    ranked = [
        [hit.id for hit in build(method=method).search(query, k=99)] for method in ("bm25", "embeddings")
    ]
    expected = {
        document: sum(1 / (rrf_k + ids.index(document) + 1) for ids in ranked if document in ids)
        for document in ("returns", "shipping", "repair")
    }
    hits = build(method="hybrid", rrf_k=rrf_k).search(query)
    assert {hit.id: hit.score for hit in hits} == pytest.approx(expected)
    assert [hit.id for hit in hits] == sorted(expected, key=expected.get, reverse=True)


@pytest.mark.parametrize("method", ["bm25", "embeddings", "hybrid"])
def test_ties_keep_the_order_of_the_documents(method):
    text = " ".join(f"word{i} " * (i % 7) for i in range(50))
    for number in range(2, 20):
        documents = [{"id": f"d{i}", "title": "Same", "text": text} for i in range(number)]
        ids = [hit.id for hit in build(documents, method=method).search(text[::-1] + text[:99], k=number)]
        assert ids == [document["id"] for document in documents]


@pytest.mark.parametrize("method", ["bm25", "embeddings", "hybrid"])
def test_at_most_k_hits_come_back_best_first(method):
    hits = build(method=method, chunk_words=7).search("boots go back", k=2)
    assert len(hits) == 2
    assert hits[0].score >= hits[1].score
    assert hits[0].id == "returns"


def test_hits_show_their_text_escaped():
    (hit,) = hits = build([{"id": "<i>", "title": "<b>", "text": "a <script> tent"}]).search("tent")
    assert hit.text == "a <script> tent"
    shown = hits._repr_html_()
    assert not re.search("<(i|b|script)>", shown)
    assert "a &lt;script&gt; tent" in shown
    assert "nothing found" in build().search("kayak")._repr_html_()


def test_a_real_model_finds_by_meaning_what_shares_no_word(client):
    query = "When will my package come?"
    assert Index(DOCUMENTS, method="bm25").search(query) == []
    for method in ("embeddings", "hybrid"):
        assert Index(DOCUMENTS, method=method, client=client).search(query, k=1)[0].id == "shipping"


# Saved and loaded


@pytest.mark.parametrize("method", ["bm25", "embeddings", "hybrid"])
def test_a_loaded_index_finds_the_same_without_embedding_again(method, tmp_path):
    index = build(method=method, k1=1.2, b=0.5, rrf_k=10)
    index.save(tmp_path / "index.npz")
    client = Client()
    loaded = Index.load(tmp_path / "index.npz", model=MODEL, client=client)
    assert client.embedded == []
    assert loaded.search("boots in a box") == index.search("boots in a box")
    assert repr(loaded) == repr(index)


def test_an_index_of_another_embedding_model_is_refused(tmp_path):
    build(method="embeddings").save(tmp_path / "index.npz")
    with pytest.raises(ValueError, match=r"model 'scripted'.*with 'another': pass model='scripted'"):
        Index.load(tmp_path / "index.npz", model="another", client=Client())


def test_an_index_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "_FORMAT", "companion index, version 0")
    build().save(tmp_path / "index.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 1"):
        Index.load(tmp_path / "index.npz")


def test_a_file_that_is_no_whole_index_is_refused(tmp_path):
    build(method="embeddings").save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.ones(3))
    others = {"empty": b"", "text": b"id,title,text\n", "half": whole[: len(whole) // 2]}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for name in [*others, "array.npy"]:
        with pytest.raises(ValueError, match=f"{name} is no index"):
            Index.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "missing.npz")


def test_nothing_in_a_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    np.savez(tmp_path / "index.npz", header=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="is no index"):
        Index.load(tmp_path / "index.npz")
    assert not (tmp_path / "executed").exists()


def test_saving_that_fails_leaves_the_old_index_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "index.npz"
    build().save(path)

    def write_half(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", write_half)
    with pytest.raises(OSError, match="disk full"):
        build(DOCUMENTS[:1]).save(path)
    monkeypatch.undo()
    assert len(Index.load(path)) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["index.npz"]


@pytest.mark.parametrize("room", [0, 64 << 10])
def test_saving_on_a_full_disk_leaves_the_old_index_and_no_rubbish(tmp_path, room):
    noise = random.Random(room).randbytes(100_000).hex()  # so that it cannot be made small
    larger = build([*DOCUMENTS, {"id": "noise", "title": "Noise", "text": noise}])
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "index.npz"
        build().save(path)
        before, filler = path.read_bytes(), fill(disk, room)
        with pytest.raises(OSError, match="No space left"):
            larger.save(path)
        assert path.read_bytes() == before
        assert {file.name for file in disk.iterdir()} == {"index.npz", "filler"}
        filler.unlink()
        larger.save(path)
        assert len(Index.load(path)) == len(larger)
        assert [file.name for file in disk.iterdir()] == ["index.npz"]


def test_saving_on_a_read_only_disk_leaves_the_old_index(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        build().save(disk / "index.npz")
        make_read_only(disk)
        with pytest.raises(OSError, match="Read-only file system"):
            build(DOCUMENTS[:1]).save(disk / "index.npz")
        assert len(Index.load(disk / "index.npz")) == 3


# What it refuses


@pytest.mark.parametrize(
    ("documents", "told"),
    [
        ([], "no documents"),
        (["text"], "document 0 must be a record"),
        ([{"id": "a", "text": "x"}], "document 0 needs .* as 'title', not None"),
        ([DOCUMENTS[0], {"id": "b", "title": "x", "text": " "}], "document 1 needs .* as 'text', not ' '"),
        ([{"id": 7, "title": "x", "text": "x"}], "as 'id', not 7"),
        ([DOCUMENTS[0], DOCUMENTS[0]], "two documents have the id 'returns'"),
    ],
)
def test_records_that_cannot_be_indexed_are_named(documents, told):
    with pytest.raises(ValueError, match=told):
        build(documents)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"method": "tfidf"}, "method must be one of"), ({"chunk_words": 0}, "at least 1, not 0")],
)
def test_settings_that_cannot_work_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        build(**arguments)


@pytest.mark.parametrize("query", ["", "  ", None, 7])
def test_only_text_can_be_searched_for(query):
    with pytest.raises(ValueError, match="query must be a string"):
        build().search(query)


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k must be at least 1"):
        build().search("boots", k=0)
