"""Text-representation methods, which compare texts.

`tfidf`, `bm25`, `ngram` and `dsir` see the text only; `hidden` reads the target's own hidden
states; `embedding` uses any sentence encoder. All of them score by a dot product. `train_text` and
`query_text` say which part of an example each reads. `response-ngram` and `response-tfidf` are
controls: string matching of responses, with nothing tuned.
"""

from tdabench.api import hookimpl
from tdabench_text.lexical import BM25, DSIR, NGram, ResponseNGram, ResponseTfIdf, TfIdf
from tdabench_text.neural import Embedding, Hidden

__all__ = [
    "BM25",
    "DSIR",
    "Embedding",
    "Hidden",
    "NGram",
    "ResponseNGram",
    "ResponseTfIdf",
    "TfIdf",
    "tdabench_methods",
]


@hookimpl
def tdabench_methods():
    return [TfIdf, BM25, NGram, DSIR, ResponseNGram, ResponseTfIdf, Hidden, Embedding]
