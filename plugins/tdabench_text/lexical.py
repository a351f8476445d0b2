"""Methods on term counts: TF-IDF, BM25, n-gram overlap and DSIR.

An example is encoded as a sparse row over 2^62 hashed terms, where collisions are practically
impossible. `fit` lists the terms of the training corpus; `transform` keeps and weights them. So
`encode` needs no vocabulary, and the state is no larger than the corpus.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import Context, Example, RepresentationMethod, Role, UsageError
from tdabench_text.roles import PART_GRID, Part, Reads

if TYPE_CHECKING:
    import scipy.sparse as sp

TERMS = 1 << 62
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Returns the lower-cased runs of letters, digits and underscores."""
    return WORD.findall(text.lower())


def ngrams(items: Sequence[str], sizes: Iterable[int], joint: str) -> list[str]:
    """Returns all n-grams of each size, in order."""
    return [joint.join(items[i : i + n]) for n in sizes for i in range(len(items) - n + 1)]


@lru_cache(maxsize=1 << 18)
def term_hash(term: str) -> int:
    """Returns 62 bits of blake2b: the same on every machine, unlike `hash`."""
    digest = blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def count_rows(lists: Iterable[Sequence[str]], buckets: int = TERMS) -> sp.csr_matrix:
    """Returns term counts, CSR float32 [example, buckets]."""
    import scipy.sparse as sp

    data: list[int] = []
    indices: list[int] = []
    indptr = [0]
    for terms in lists:
        counts = Counter(term_hash(t) % buckets for t in terms)
        indices.extend(sorted(counts))
        data.extend(counts[i] for i in indices[indptr[-1] :])
        indptr.append(len(indices))
    parts = (
        np.array(data, dtype=np.float32),
        np.array(indices, dtype=np.int64),
        np.array(indptr, dtype=np.int64),
    )
    return sp.csr_matrix(parts, shape=(len(indptr) - 1, buckets))


def document_frequencies(counts: sp.csr_matrix) -> dict[str, np.ndarray]:
    """Returns `terms` [term], sorted hashes, and `df` [term], the number of examples with each."""
    terms, df = np.unique(counts.indices, return_counts=True)
    return {"terms": terms.astype(np.int64), "df": df.astype(np.int64)}


def known_terms(counts: sp.csr_matrix, terms: np.ndarray) -> sp.csr_matrix:
    """Returns the columns `terms` of `counts`, [example, term]; drops other terms."""
    import scipy.sparse as sp

    place = np.searchsorted(terms, counts.indices)
    place = np.minimum(place, max(0, len(terms) - 1))
    known = terms[place] == counts.indices if len(terms) else np.zeros(counts.nnz, dtype=bool)
    indptr = np.concatenate([[0], np.cumsum(known)])[counts.indptr]
    parts = (counts.data[known], place[known], indptr)
    return sp.csr_matrix(parts, shape=(counts.shape[0], len(terms)))


def scale_rows(m: sp.csr_matrix, factors: np.ndarray) -> sp.csr_matrix:
    """Multiplies row i of `m` by factors[i]."""
    out = m.copy()
    out.data = (m.data * np.repeat(factors, np.diff(m.indptr))).astype(np.float32)
    return out


def unit_rows(m: sp.csr_matrix) -> sp.csr_matrix:
    """Scales rows to length 1; an empty row stays empty."""
    norms = np.sqrt(row_sums(m.power(2)))
    return scale_rows(m, 1.0 / np.where(norms > 0, norms, 1.0))


def row_sums(m: sp.csr_matrix) -> np.ndarray:
    """Sums each row: float64 [row]."""
    return np.asarray(m.sum(axis=1, dtype=np.float64)).ravel()


@dataclass(frozen=True, kw_only=True)
class _Lexical(Reads, RepresentationMethod):
    """Base of the methods on terms: texts become sparse rows of hashed terms."""

    family = "text"
    grid = PART_GRID

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> sp.csr_matrix:
        return count_rows(map(self._terms, self.texts(examples, role)))

    @property
    def _terms(self) -> Callable[[str], list[str]]:
        return words

    def fit(self, context: Context, features: Any) -> dict[str, np.ndarray]:
        return document_frequencies(features)


@dataclass(frozen=True, kw_only=True)
class TfIdf(_Lexical):
    """Cosine of TF-IDF vectors over words: tf * (ln((1 + N) / (1 + df)) + 1), length 1.

    N and df are computed on the training corpus; a word that does not occur there is left out of
    the query.

    sublinear  replace tf by 1 + ln(tf)
    """

    name = "tfidf"
    summary = "cosine of TF-IDF vectors over words"
    source = "Salton & Buckley 1988, doi:10.1016/0306-4573(88)90021-0"

    sublinear: bool = False

    def fit(self, context: Context, features: Any) -> dict[str, np.ndarray]:
        state = document_frequencies(features)
        idf = np.log((1 + features.shape[0]) / (1 + state["df"])) + 1
        return {"terms": state["terms"], "idf": idf.astype(np.float32)}

    def transform(
        self, features: Any, state: Mapping[str, np.ndarray], role: Role
    ) -> sp.csr_matrix:
        m = known_terms(features, state["terms"])
        if self.sublinear:
            m.data = 1 + np.log(m.data)
        m.data *= state["idf"][m.indices]
        return unit_rows(m)


@dataclass(frozen=True, kw_only=True)
class BM25(_Lexical):
    """Okapi BM25: sum over the query's words of idf * tf (k1 + 1) / (tf + k1 (1 - b + b len/avg)).

    idf = ln(1 + (N - df + 1/2) / (df + 1/2)), which is never negative. A word that occurs several
    times in the query counts as often.

    k1  how slowly a repeated word saturates; 0 ignores repetition
    b   share of the correction for length, from 0 to 1
    """

    name = "bm25"
    summary = "Okapi BM25 of the query against each training example"
    source = "Robertson & Zaragoza 2009, doi:10.1561/1500000019"

    k1: float = 1.2
    b: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise UsageError(f"bm25: k1 = {self.k1}, b = {self.b}", "Need k1 >= 0 and 0 <= b <= 1")

    def fit(self, context: Context, features: Any) -> dict[str, np.ndarray]:
        state = document_frequencies(features)
        df, n = state["df"], features.shape[0]
        lengths = row_sums(features)
        return {
            "terms": state["terms"],
            "idf": np.log1p((n - df + 0.5) / (df + 0.5)).astype(np.float32),
            "average": np.array([lengths.mean() if n else 0.0]),
        }

    def transform(
        self, features: Any, state: Mapping[str, np.ndarray], role: Role
    ) -> sp.csr_matrix:
        m = known_terms(features, state["terms"])
        if role == "query":
            m.data *= state["idf"][m.indices]
            return m
        lengths = row_sums(features) / max(float(state["average"][0]), 1e-12)
        norm = np.repeat(self.k1 * (1 - self.b + self.b * lengths), np.diff(m.indptr))
        m.data = (m.data * (self.k1 + 1) / (m.data + norm)).astype(np.float32)
        return m


@dataclass(frozen=True, kw_only=True)
class NGram(_Lexical):
    """Overlap of n-gram sets A (query) and B (training): |A & B| / sqrt(|A| |B|), or |A & B|.

    unit       "word" or "char" (lower-cased, spaces collapsed)
    n          sizes of the n-grams
    normalise  divide by sqrt(|A| |B|); otherwise the count of shared n-grams is the score, which
               favours long examples
    """

    name = "ngram"
    summary = "overlap of word or character n-grams"
    grid = {**PART_GRID, "unit": ("word", "char"), "n": ((1, 2), (3,), (2, 3, 4), (1, 2, 3, 4))}
    source = "Ochiai coefficient of n-gram sets"

    unit: Literal["word", "char"] = "word"
    n: tuple[int, ...] = (1, 2)
    normalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.n or min(self.n) < 1:
            raise UsageError(f"ngram: n = {self.n}", "Give sizes of 1 or more, such as 1,2,3")

    @property
    def _terms(self) -> Callable[[str], list[str]]:
        if self.unit == "word":
            return lambda text: ngrams(words(text), self.n, " ")
        return lambda text: ngrams(" ".join(text.lower().split()), self.n, "")

    def transform(
        self, features: Any, state: Mapping[str, np.ndarray], role: Role
    ) -> sp.csr_matrix:
        m = known_terms(features, state["terms"])
        m.data = np.ones_like(m.data)
        if not self.normalise:
            return m
        sizes = np.diff(features.indptr)  # |A| includes n-grams that are not in the corpus
        return scale_rows(m, 1.0 / np.sqrt(np.maximum(sizes, 1)))


@dataclass(frozen=True, kw_only=True)
class DSIR(_Lexical):
    """Log importance weight of a training example when the query is the target distribution.

    Words are hashed, as unigrams and bigrams, into `buckets`; p_q and p are the bucket
    frequencies of the query and of the corpus, and the score is

        sum over buckets of count_z * (log p_q - log p).

    A single query provides little data for p_q, so it is smoothed towards the corpus.

    buckets    number of hash buckets
    smoothing  pseudo-counts of the corpus added to a query's counts (the paper, with thousands of
               target texts, adds 1e-8)
    per_token  divide by the number of n-grams of the example: the mean log ratio, which does not
               penalise length
    """

    name = "dsir"
    summary = "importance weights over hashed n-grams"
    source = "Xie et al. 2023, arXiv:2302.03169"

    buckets: int = 10_000
    smoothing: float = 10.0
    per_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets < 1 or not self.smoothing > 0:
            raise UsageError("dsir: buckets and smoothing must be positive")

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> sp.csr_matrix:
        texts = self.texts(examples, role)
        return count_rows((ngrams(words(t), (1, 2), " ") for t in texts), self.buckets)

    def fit(self, context: Context, features: Any) -> dict[str, np.ndarray]:
        counts = np.asarray(features.sum(axis=0, dtype=np.float64)).ravel()
        return {"p": counts / max(counts.sum(), 1.0)}

    def transform(
        self, features: Any, state: Mapping[str, np.ndarray], role: Role
    ) -> sp.csr_matrix:
        # p_q = (c + a p) / (N + a), so log p_q / p = log(1 + c / (a p)) - log((N + a) / a): the
        # first term is sparse; the second is the same for every bucket and takes one extra column.
        import scipy.sparse as sp

        a, p = self.smoothing, state["p"]
        m, total = sp.csr_matrix(features), row_sums(features)
        if role == "train":
            out = sp.hstack([m, sp.csr_matrix(total[:, None])], format="csr")
            return scale_rows(out, 1.0 / np.maximum(total, 1) if self.per_token else total * 0 + 1)
        seen = p[m.indices] > 0
        ratio = np.zeros(m.nnz)
        ratio[seen] = np.log1p(m.data[seen] / (a * p[m.indices[seen]]))
        m = sp.csr_matrix((ratio, m.indices, m.indptr), shape=m.shape)
        constant = sp.csr_matrix(-np.log((total + a) / a)[:, None])
        return sp.hstack([m, constant], format="csr").astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ResponseNGram(NGram):
    """Overlap of the character n-grams of two responses: `ngram` that knows no model or prompt.

    A control: nothing of it is tuned, and what a method reaches beyond it is what the model added.
    """

    name = "response-ngram"
    family = "control"
    summary = "overlap of the responses' character n-grams, untuned"
    grid = {}

    unit: Literal["word", "char"] = "char"
    n: tuple[int, ...] = (2, 3, 4)
    train_text: Part = "response"
    query_text: Part = "response"


@dataclass(frozen=True, kw_only=True)
class ResponseTfIdf(TfIdf):
    """Cosine of the responses' TF-IDF vectors, the text baseline of AirRep's selection script.

    A control: nothing of it is tuned.
    """

    name = "response-tfidf"
    family = "control"
    summary = "cosine of the responses' TF-IDF vectors, untuned"
    grid = {}

    train_text: Part = "response"
    query_text: Part = "response"
