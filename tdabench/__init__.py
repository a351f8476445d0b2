"""tdabench: benchmarks for training-data attribution on language models."""

import os

__version__ = "0.1.0"

# Time that an idle thread of numpy's linear algebra spins before it sleeps: 2^20 cycles, not 2^26
# (0.03 s, during which it takes a core from other threads). Read when numpy is loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
