"""Search in a company's own documents: by words (BM25), by meaning (embeddings), or by both.

An `Index` is held in memory and searched whole: right for thousands of pages, not for millions. It reads no
files but its own: documents come as records with plain or Markdown text.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from companion import backend

if TYPE_CHECKING:
    import numpy as np
    from openai import OpenAI

Method = Literal["embeddings", "bm25", "hybrid"]

_FORMAT = "companion index, version 1"
_BATCH = 64  # texts in one request for embeddings
_HEADING = re.compile(r"(#{1,6})\s+(.*?)[\s#]*")


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: the document's `id` and `title`, and text that begins with its headings."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Hit(Chunk):
    """A chunk that was found. Its `score` can be compared with those of the same search only."""

    score: float


class Hits(list[Hit]):
    """The hits of a search, best first: a list, and shown as one in Jupyter."""

    def _repr_html_(self) -> str:
        if not self:
            return "<em>nothing found</em>"
        items = (
            f"<li><strong>{html.escape(hit.title)}</strong> ({html.escape(hit.id)}), "
            f"score {hit.score:.3f}"
            f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(hit.text)}</div></li>'
            for hit in self
        )
        return f"<ol>{''.join(items)}</ol>"


class Index:
    """Documents, cut into `chunks` and ready to be searched.

    - "bm25" scores by shared words, as they are written, without stemming: Robertson & Zaragoza 2009, The
      Probabilistic Relevance Framework: BM25 and Beyond, section 3.4, with log(1 + (N - n + 0.5) / (n + 0.5))
      for a word in n of N chunks, which stays positive for common words. A chunk that shares no word with the
      query is not found.
    - "embeddings" scores by the cosine of the query's vector and the chunk's, from -1 to 1.
    - "hybrid" adds 1 / (rrf_k + rank) over both rankings: reciprocal rank fusion, Cormack, Clarke & Büttcher
      2009.

    Args:
        documents: records with the strings "id" (each once), "title" and "text"; other fields are ignored.
        method: how to search.
        model: the embedding model's name; the backend's default if None.
        client: an `openai.OpenAI`; the backend's if None.
        chunk_words: the most words in a chunk, besides its headings. Paragraphs under one heading are joined
            up to it, and a longer one is cut. 120 stay below the 256 tokens that a small embedding model
            reads.
        k1: how much a repeated word still adds, in BM25; 0 counts it once.
        b: how much BM25 holds a chunk's length against it, from 0 to 1.
        rrf_k: the constant of reciprocal rank fusion; larger evens out the ranks.

    Raises:
        ValueError: an unknown method, a chunk_words below 1, no documents, or a record that is not as above.
    """

    def __init__(
        self,
        documents: Iterable[Mapping[str, str]],
        *,
        method: Method = "embeddings",
        model: str | None = None,
        client: OpenAI | None = None,
        chunk_words: int = 120,
        k1: float = 1.5,
        b: float = 0.75,
        rrf_k: int = 60,
    ):
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
        if chunk_words < 1:
            raise ValueError(f"chunk_words must be at least 1, not {chunk_words!r}")
        chunks = [chunk for document in _check(documents) for chunk in _split(document, chunk_words)]
        self._set_up(chunks, method, model, client, k1, b, rrf_k)
        if method != "bm25":
            self._vectors = self._embed([f"{chunk.title}\n{chunk.text}" for chunk in chunks])

    def _set_up(self, chunks, method, model, client, k1, b, rrf_k) -> None:
        self.chunks: list[Chunk] = chunks
        self.method: Method = method
        self.model: str | None = None if method == "bm25" else model or backend.embedding_model()
        self.k1, self.b, self.rrf_k = k1, b, rrf_k
        self._client = client
        self._vectors: np.ndarray | None = None  # a row a chunk, each of length 1
        self._weights = _weigh([f"{chunk.title}\n{chunk.text}" for chunk in chunks], k1, b)

    def search(self, query: str, k: int = 5) -> Hits:
        """Find the `k` chunks that fit `query` best; fewer where fewer fit. Ties keep the documents' order.

        Raises:
            ValueError: the query is no string or empty, or k is below 1.
        """
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"query must be a string with something in it, not {query!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k!r}")
        if self.method == "bm25":
            scores = self._score_words(query)
        elif self.method == "embeddings":
            scores = self._score_meaning(query)
        else:
            scores = defaultdict(float)
            for ranking in (_rank(self._score_words(query)), _rank(self._score_meaning(query))):
                for rank, i in enumerate(ranking, start=1):
                    scores[i] += 1 / (self.rrf_k + rank)
        return Hits(Hit(**asdict(self.chunks[i]), score=scores[i]) for i in _rank(scores)[:k])

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to one file, replacing it whole or not at all."""
        import numpy as np

        header = {"format": _FORMAT, "method": self.method, "model": self.model}
        header |= {"k1": self.k1, "b": self.b, "rrf_k": self.rrf_k}
        header["chunks"] = [asdict(chunk) for chunk in self.chunks]
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        if self._vectors is not None:
            arrays["vectors"] = self._vectors
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, model: str | None = None, client: OpenAI | None = None
    ) -> Index:
        """Read an index that `save` wrote. Nothing is embedded again, and nothing in the file is executed.

        Args:
            path: the file.
            model: the embedding model, which must be the one of the index; the backend's default if None.
            client: an `openai.OpenAI`; the backend's if None.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no index, or one of another format version or embedding model.
        """
        import numpy as np

        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                vectors = arrays.get("vectors")
        except OSError:
            raise
        except Exception as error:  # numpy, zipfile and json each raise their own
            raise ValueError(f"{path} is no index, or not a whole one: build it again and save it") from error
        if header.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not of the format {_FORMAT!r}: build the index again and save it")
        index = cls.__new__(cls)
        stored_model = header.pop("model")
        chunks = [Chunk(**chunk) for chunk in header.pop("chunks")]
        index._set_up(chunks, model=model, client=client, **header)
        if index.model != stored_model:
            raise ValueError(
                f"{path} was made with the embedding model {stored_model!r}, which cannot be compared "
                f"with {index.model!r}: pass model={stored_model!r}, or build the index again"
            )
        index._vectors = vectors
        return index

    def __len__(self) -> int:
        return len(self.chunks)

    def __repr__(self) -> str:
        size = f"{len(self)} chunks of {len({chunk.id for chunk in self.chunks})} documents"
        return f"Index({size}, method={self.method!r}, model={self.model!r})"

    def _score_words(self, query: str) -> dict[int, float]:
        scores: dict[int, float] = defaultdict(float)
        for word in _words(query):
            for i, weight in self._weights.get(word, {}).items():
                scores[i] += weight
        return scores

    def _score_meaning(self, query: str) -> dict[int, float]:
        cosines = self._vectors @ self._embed([query])[0]
        # Beyond six digits a float32 product can depend on the row's place in memory, which would part ties.
        return {i: round(float(cosine), 6) for i, cosine in enumerate(cosines)}

    def _embed(self, texts: list[str]) -> np.ndarray:
        import numpy as np

        client = self._client or backend.client()
        vectors = []
        for start in range(0, len(texts), _BATCH):
            answer = client.embeddings.create(model=self.model, input=texts[start : start + _BATCH])
            vectors += [item.embedding for item in sorted(answer.data, key=lambda item: item.index)]
        vectors = np.array(vectors, dtype=np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _check(documents: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    documents = list(documents)
    if not documents:
        raise ValueError("there are no documents to index")
    seen = set()
    for number, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise ValueError(f"document {number} must be a record with id, title and text, not {document!r}")
        for field in ("id", "title", "text"):
            value = document.get(field)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"document {number} needs a string with something in it as {field!r}, not {value!r}"
                )
        if document["id"] in seen:
            raise ValueError(f"two documents have the id {document['id']!r}")
        seen.add(document["id"])
    return documents


def _split(document: Mapping[str, str], chunk_words: int) -> Iterator[Chunk]:
    """Join the paragraphs under the same headings, and cut long ones, to at most `chunk_words` words."""
    title = document["title"]
    for headings, group in groupby(_paragraphs(document["text"]), key=itemgetter(0)):
        above = " > ".join(heading for heading in headings if heading != title)
        pieces: list[str] = []
        for piece in (piece for _, paragraph in group for piece in _cut(paragraph, chunk_words)):
            if pieces and len(" ".join([*pieces, piece]).split()) > chunk_words:
                yield Chunk(document["id"], title, "\n\n".join(filter(None, [above, *pieces])))
                pieces = []
            pieces.append(piece)
        yield Chunk(document["id"], title, "\n\n".join(filter(None, [above, *pieces])))


def _paragraphs(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Give each paragraph with the Markdown headings above it, outermost first."""
    headings: dict[int, str] = {}
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        heading = _HEADING.fullmatch(line.strip())
        if line.strip() and not heading:
            lines.append(line)
            continue
        if lines:
            yield tuple(headings.values()), "\n".join(lines)
            lines = []
        if heading:
            level = len(heading[1])
            headings = {other: name for other, name in headings.items() if other < level} | {
                level: heading[2]
            }


def _cut(paragraph: str, chunk_words: int) -> list[str]:
    words = paragraph.split()
    if len(words) <= chunk_words:
        return [paragraph]
    return [" ".join(words[start : start + chunk_words]) for start in range(0, len(words), chunk_words)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _weigh(texts: list[str], k1: float, b: float) -> dict[str, dict[int, float]]:
    """Give BM25's weight of each word in each text, as {word: {number of the text: weight}}."""
    counts = [Counter(_words(text)) for text in texts]
    average = sum(count.total() for count in counts) / len(counts) or 1
    weights: dict[str, dict[int, float]] = defaultdict(dict)
    for i, count in enumerate(counts):
        for word, n in count.items():
            weights[word][i] = n / (n + k1 * (1 - b + b * count.total() / average))
    for found in weights.values():
        rarity = math.log(1 + (len(texts) - len(found) + 0.5) / (len(found) + 0.5))
        for i in found:
            found[i] *= rarity
    return dict(weights)


def _rank(scores: Mapping[int, float]) -> list[int]:
    return sorted(scores, key=lambda i: (-scores[i], i))
