"""Examples, corpora and the file formats they come in."""

from tdabench.data.examples import Corpus, Example, read_jsonl

__all__ = ["Corpus", "Example", "read_jsonl"]
