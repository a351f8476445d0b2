"""Encoding text compared with the bare model on input that needs no padding.

    python benchmarks/encode_speed.py [--texts 2000] [--device cuda]

The texts come from the suite `pocket`. The yardstick is the model alone: ids tokenised beforehand,
batches of texts of exactly equal length (at most `--budget` tokens; few lengths have that many), no
attention mask, mean over tokens. `encode_texts` starts from strings: it tokenises, sorts by length,
pads, masks, pools and restores the order; "less tokenising" subtracts the time of the tokenizer
itself, which the yardstick excludes. Models are random, of two shapes: `small` (2 layers, 128 wide)
and `minilm` (6 layers, 384 wide, like most small sentence encoders). Time is wall time, the best of
rounds over all contenders; each number of threads runs in a separate process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

SHAPES = {"small": (2, 128, 4, 512), "minilm": (6, 384, 12, 1536)}  # layers, width, heads, inner


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=8192, help="tokens a batch, bare model")
    parser.add_argument("--tokens-a-batch", type=int, help="of encode_texts; its own by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default="1,2", help="how many, one process each")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        measure(args)
        return
    print(f"{'':40}{'texts/s':>10}{'of bare':>9}")
    for count in args.threads.split(","):
        several = str(count != "1").lower()
        env = {
            **os.environ, "OMP_NUM_THREADS": count, "RAYON_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": several,
        }  # fmt: skip
        command = [sys.executable, __file__, "--here", *sys.argv[1:]]
        subprocess.run(command, env=env, check=True)


def measure(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from transformers import BertConfig, BertModel

    from tdabench.run.sources import load_suite
    from tdabench.toolkit.encode import encode_texts

    suite = load_suite("pocket")
    tokenizer = suite.target("instruct").target.tokenizer
    texts = [e.text for e in suite.train[: args.texts]]
    for shape, (layers, width, heads, inner) in SHAPES.items():
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=inner,
        )  # fmt: skip
        torch.manual_seed(0)
        model = BertModel(config).eval().to(args.device)
        ids = tokenizer(texts, add_special_tokens=True)["input_ids"]
        batches = equal_lengths(ids, args.budget, args.device)

        def bare(model: Any = model, batches: Any = batches) -> np.ndarray:
            out = np.empty((len(texts), model.config.hidden_size), np.float32)
            with torch.inference_mode():
                for index, block in batches:
                    out[index] = model(input_ids=block).last_hidden_state.mean(1).cpu().numpy()
            return out

        def ours(model: Any = model) -> np.ndarray:
            return encode_texts(model, tokenizer, texts, tokens_a_batch=args.tokens_a_batch)

        def tokenise() -> None:
            tokenizer(texts, return_attention_mask=False, verbose=False)

        runs = {"bare": bare, "ours": ours, "tokenise": tokenise}
        seconds, answers = rounds(runs, args.rounds)
        assert np.abs(answers["bare"] - answers["ours"]).max() < 1e-4
        name = f"{shape}, {os.environ['OMP_NUM_THREADS']} thread(s), {args.device}"
        print(f"{name + ', bare model':40}{len(texts) / seconds['bare']:10.0f}{1.0:9.2f}")
        ratio = seconds["bare"] / seconds["ours"]
        print(f"{name + ', encode_texts':40}{len(texts) / seconds['ours']:10.0f}{ratio:9.2f}")
        rest = seconds["ours"] - seconds["tokenise"]
        without = f"{name}, less tokenising"
        print(f"{without:40}{len(texts) / rest:10.0f}{seconds['bare'] / rest:9.2f}")
        sys.stdout.flush()


def equal_lengths(ids: Sequence[Sequence[int]], budget: int, device: str) -> list[tuple]:
    """Yields (positions, token ids [b, t]) of texts of one length, on the device."""
    import numpy as np
    import torch

    lengths = np.array([len(x) for x in ids])
    out = []
    for t in np.unique(lengths):
        places = np.flatnonzero(lengths == t)
        step = max(1, budget // int(t))
        for a in range(0, len(places), step):
            index = places[a : a + step]
            out.append((index, torch.tensor([ids[i] for i in index], device=device)))
    return out


def rounds(runs: dict[str, Callable[[], Any]], n: int) -> tuple[dict[str, float], dict[str, Any]]:
    seconds, answers = dict.fromkeys(runs, float("inf")), {}
    for _ in range(n + 1):  # the first is a warm-up
        for name, run in runs.items():
            start = time.perf_counter()
            answers[name] = run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds, answers


if __name__ == "__main__":
    main()
