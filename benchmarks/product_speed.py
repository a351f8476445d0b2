"""Float32 products and passes on a CPU: `fast_products` against torch's default library.

    OMP_NUM_THREADS=1 python benchmarks/product_speed.py

Prints processor time of each shape by turns (best of several), the ratio, and the largest rounding
error of either against float64, relative to the largest result. On processors where tdabench leaves
torch's default the ratio is 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from tdabench.api import GradientEngine, example_losses, fast_products, pad
from tdabench.run.sources import load_suite
from tdabench.targets.products import onednn_is_faster

SHAPES = [  # m, n, k of [m, k] @ [k, n], and how many of them in one call
    (4096, 384, 128, 1), (4096, 128, 384, 1), (384, 128, 29, 141), (141, 400, 49152, 1),
    (1024, 1024, 1024, 1),
]  # fmt: skip


def by_turns(compute: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Returns the least processor seconds of (torch's default, fast products)."""
    best = [np.inf, np.inf]
    for _ in range(rounds + 1):  # the first call of each compiles
        for i in range(2):
            start = time.process_time()
            if i:
                with fast_products():
                    compute()
            else:
                compute()
            best[i] = min(best[i], time.process_time() - start)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smooth")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"oneDNN in place of MKL: {onednn_is_faster()}; {torch.get_num_threads()} threads")
    print(f"{'product':34} {'default ms':>11} {'fast ms':>9} {'ratio':>6} {'rounding errors':>18}")
    generator = torch.Generator().manual_seed(0)
    for m, n, k, count in SHAPES:
        a = torch.randn(count, m, k, generator=generator)
        b = torch.randn(count, k, n, generator=generator)
        slow, fast = by_turns(lambda a=a, b=b: torch.matmul(a, b), args.rounds)  # type: ignore[misc]
        exact = a[0].double() @ b[0].double()
        errors = [float((torch.matmul(a, b)[0] - exact).abs().max() / exact.abs().max())]
        with fast_products():
            errors.append(float((torch.matmul(a, b)[0] - exact).abs().max() / exact.abs().max()))
        name = f"{count} x [{m}, {k}] @ [{k}, {n}]"
        print(
            f"{name:34} {slow * 1e3:11.2f} {fast * 1e3:9.2f} {slow / fast:5.2f}x "
            f"{errors[0]:9.1e}{errors[1]:9.1e}",
            flush=True,
        )

    suite = load_suite("pocket")
    target = suite.target(args.target).target
    model = target.fresh_model("base").requires_grad_(True)
    tokens = target.tokenize(list(suite.train)[:128])
    batch = pad(tokens, np.arange(128), target.pad_id)
    length = batch.input_ids.shape[1]
    engine = GradientEngine(model, bias=True)

    def passes(plain: bool) -> float:
        start = time.process_time()
        if plain:
            example_losses(model, batch).sum().backward()
        else:
            with fast_products(model, length):
                example_losses(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)
        return time.process_time() - start

    best = [min(passes(plain) for _ in range(args.rounds + 1)) for plain in (True, False)]
    print(
        f"{f'forward and backward, 128 x {length} tokens':34} {best[0] * 1e3:11.2f} "
        f"{best[1] * 1e3:9.2f} {best[0] / best[1]:5.2f}x   (weights: {engine.dim:,})"
    )


if __name__ == "__main__":
    main()
