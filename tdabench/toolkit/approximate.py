"""Approximate search behind the extra `faiss`, for corpora too large to scan for every query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import DataError, MissingExtra, UsageError
from tdabench.io import write_bytes
from tdabench.rows import row_blocks


class FaissIndex:
    """Approximate top-k by FAISS, for corpora for which a scan takes too long.

    `spec` is a FAISS factory string: "Flat" is exact, "IVF1024,SQ8" reads a share of the rows,
    "HNSW32" searches a graph. All use the inner product; the index is held in memory. `rows` [n, d]
    is an array or a `FeatureStore`; `probes` is the number of IVF cells that a query reads. Needs
    the extra `faiss`.

    Raises MissingExtra without FAISS, and UsageError for a `spec` that FAISS cannot build.
    """

    def __init__(self, rows: Any, spec: str = "IVF1024,SQ8", probes: int = 32) -> None:
        faiss = _faiss()
        n, d = rows.shape
        self.shape = (n, d)
        try:
            self.index = faiss.index_factory(d, spec, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as e:
            raise UsageError(f"FAISS does not know the index {spec!r}", "Use Flat or HNSW32") from e
        if not self.index.is_trained:
            # FAISS needs 40 to 256 rows per cell: an even sample of the corpus, in order.
            most = max(256, min(n, 1 << 17))
            sample = np.unique(np.linspace(0, max(0, n - 1), most).astype(np.int64))
            try:
                self.index.train(np.ascontiguousarray(rows[sample], dtype=np.float32))
            except RuntimeError as e:
                raise UsageError(
                    f"FAISS cannot train {spec!r} on {n} rows", "Use fewer cells, or Flat"
                ) from e
        for _, block in row_blocks(rows):
            self.index.add(np.ascontiguousarray(block, dtype=np.float32))
        self._probe(probes)

    def top_k(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns values float32 and ids int64 [query, min(k, n)], best first; id -1 if not found.

        Equal scores are ordered by index within the results of FAISS.
        """
        k = min(k, self.shape[0])
        if k == 0 or not len(queries):
            return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        values, ids = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
        order = np.lexsort((ids, -values), axis=1)
        return np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)

    def save(self, path: Path) -> None:
        """Writes the index to the file `path` in FAISS's format."""
        faiss = _faiss()
        write_bytes(path, faiss.serialize_index(self.index).tobytes())

    @classmethod
    def open(cls, path: Path, probes: int = 32) -> FaissIndex:
        """Opens an index that `save` wrote. Raises DataError for a damaged file."""
        faiss = _faiss()
        try:
            index = faiss.deserialize_index(np.frombuffer(Path(path).read_bytes(), dtype=np.uint8))
        except OSError as e:
            raise DataError(f"cannot read {path}: {e.strerror}") from e
        except RuntimeError as e:
            raise DataError(f"{path} is not a FAISS index, or is damaged") from e
        self = cls.__new__(cls)
        self.index, self.shape = index, (int(index.ntotal), int(index.d))
        self._probe(probes)
        return self

    def _probe(self, cells: int) -> None:
        if hasattr(self.index, "nprobe"):
            self.index.nprobe = cells


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as e:
        raise MissingExtra("FAISS", "faiss") from e
    return faiss
