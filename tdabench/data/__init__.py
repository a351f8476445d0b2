"""Examples, corpora, file formats and sources of files."""

from tdabench.data.examples import Corpus, Example
from tdabench.data.files import read_corpus, read_jsonl
from tdabench.data.layouts import Reading

__all__ = ["Corpus", "Example", "Reading", "read_corpus", "read_jsonl"]
