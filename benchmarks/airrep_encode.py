"""Encoding speed of AirRep: length-sorted token-budget batches compared with a fixed-batch loop.

    python benchmarks/airrep_encode.py [--encoder DIR] [--corpus FILE] [--split NAME] [--examples N]
        [--max-tokens N]

The corpus is JSON lines with `prompt` and `response`, or with FLAN's `inputs` and `targets`.

Prints examples per second of (a) this package, (b) a loop over fixed batches in corpus order, each
padded to its longest example, and (c) the bare forward passes over batches of equal length, which
need no padding; then a/b, with a bootstrap interval over repeats, and a/c. (c) groups examples by
exact length, so that it computes only on real tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tdabench_airrep.encoder import Encoder, encode, padded
from tdabench_airrep.loading import load_encoder

import tdabench
from tdabench.api import Example, read_jsonl

POCKET = Path(tdabench.__file__).parent / "suites" / "pocket"


def fixed(encoder: Encoder, examples: list[Example], size: int) -> np.ndarray:
    out = []
    with torch.inference_mode():
        for a in range(0, len(examples), size):
            tokens = encoder.tokenize(examples[a : a + size])
            out.append(encoder(*padded(tokens, np.arange(len(tokens)), "cpu")).numpy())
    return np.concatenate(out)


def bare(encoder: Encoder, examples: list[Example], budget: int = 2048) -> float:
    """Times forward passes alone, on prepared batches: seconds."""
    tokens = encoder.tokenize(examples)
    by_length: dict[int, list[int]] = {}
    for i, t in enumerate(tokens):
        by_length.setdefault(len(t), []).append(i)
    made = []
    for length, places in sorted(by_length.items()):
        step = max(1, min(256, budget // length))
        for a in range(0, len(places), step):
            made.append(padded(tokens, np.array(places[a : a + step]), "cpu"))
    began = time.process_time()
    with torch.inference_mode():
        for batch in made:
            encoder(*batch)
    return time.process_time() - began


def read(path: Path, split: str, n: int) -> list[Example]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as f:
        first = json.loads(f.readline())
        if "inputs" not in first:
            return list(read_jsonl(path, split or None)[:n])
        rows = [first, *map(json.loads, f)]
    return [Example(str(i), r["inputs"], r["targets"]) for i, r in enumerate(rows[:n])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", type=Path, default=POCKET / "airrep" / "instruct")
    parser.add_argument("--corpus", type=Path, default=POCKET / "corpus.jsonl.gz")
    parser.add_argument("--split", default="labels_pool")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=0, help="0: the encoder's own")
    parser.add_argument("--batch", type=int, default=128, help="as in the public code")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = load_encoder(args.encoder)
    if args.max_tokens:
        encoder.text = replace(encoder.text, max_tokens=args.max_tokens)
    examples = read(args.corpus, args.split, args.examples)
    n, times = len(examples), []
    for _ in range(args.repeats):
        a = time.process_time()
        mine = encode(encoder, examples)
        b = time.process_time()
        theirs = fixed(encoder, examples, args.batch)
        c = time.process_time()
        times.append((b - a, c - b, bare(encoder, examples)))
    assert np.abs(mine - theirs).max() < 1e-3 * np.abs(mine).max()
    t = np.array(times)
    draws = np.random.default_rng(0).integers(0, len(t), (1000, len(t)))
    ratios = np.median(t[draws, 1], axis=1) / np.median(t[draws, 0], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    ours, loop, forward = np.median(t, axis=0)
    print(f"{n} examples, medians of {len(t)}, processor time, one thread")
    print(f"length-sorted, token budget  {n / ours:8.0f} examples/s")
    print(f"fixed batches of {args.batch:<4}        {n / loop:8.0f} examples/s")
    print(f"bare forward, no padding     {n / forward:8.0f} examples/s")
    print(f"against the fixed loop {loop / ours:.2f} [{low:.2f}, {high:.2f}]; ", end="")
    print(f"of the bare forward {forward / ours:.2f}")


if __name__ == "__main__":
    main()
