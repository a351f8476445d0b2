"""Text-representation methods, which compare texts.

`tfidf`, `bm25`, `ngram` and `dsir` use only the text; `hidden` reads the target's own hidden
states; `embedding` uses any sentence encoder. All of them score by a dot product.
"""

from tdabench.api import hookimpl
from tdabench_text.lexical import BM25, DSIR, NGram, TfIdf
from tdabench_text.neural import Embedding, Hidden

__all__ = ["BM25", "DSIR", "Embedding", "Hidden", "NGram", "TfIdf", "tdabench_methods"]


@hookimpl
def tdabench_methods():
    return [TfIdf, BM25, NGram, DSIR, Hidden, Embedding]
