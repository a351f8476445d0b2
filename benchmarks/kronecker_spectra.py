"""Differences between the eigenvalues of K-FAC and EK-FAC, in the eigenbasis that both share.

    OMP_NUM_THREADS=1 python benchmarks/kronecker_spectra.py [--target instruct]

K-FAC uses products of two factors' eigenvalues, EK-FAC the mean square of per-example gradients in
the basis of these factors. Both add damping times the mean of a layer's eigenvalues, and its effect
depends on the spread of the others around the mean. Printed for each kind of layer:

    mean   mean of EK-FAC's eigenvalues divided by the mean of K-FAC's
    r      correlation of their logarithms
    below  share of a layer's eigenvalues below the damping, for K-FAC and EK-FAC
    kept   share of a layer's squared training gradients (according to EK-FAC) in the
           directions that damping shrinks by less than half, for K-FAC and EK-FAC
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from tdabench_influence.ekfac import EKFAC

from tdabench.method import Context
from tdabench.run.sources import load_suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--checkpoint", default="base")
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.001, 0.01, 0.1, 1.0])
    args = parser.parse_args()
    suite = load_suite("pocket")
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target=suite.target(args.target).target, scratch=Path(scratch))
        method = EKFAC(checkpoint=args.checkpoint)
        engine = method.engine(context)
        kfac = super(EKFAC, method).fit(context, engine, suite.train)
        ekfac = method.fit(context, engine, suite.train)
    rows = defaultdict(list)
    for layer in engine.layers:
        k, e = (s[f"lambda.{layer.name}"].astype(np.float64) for s in (kfac, ekfac))
        r = np.corrcoef(np.log(k + 1e-30).ravel(), np.log(e + 1e-30).ravel())[0, 1]
        parts = [e.mean() / k.mean(), r]
        for damping in args.dampings:
            free = [v >= damping * v.mean() for v in (k, e)]
            parts += [1 - f.mean() for f in free] + [e[f].sum() / e.sum() for f in free]
        rows[layer.name.rsplit(".", 1)[1]].append(parts)
    rows["all"] = [p for parts in rows.values() for p in parts]
    head = "".join(f"{f'below {d:g}':>14}{f'kept {d:g}':>14}" for d in args.dampings)
    print(f"{'layers':10}{'mean':>7}{'r':>6}{head}")
    for name, parts in rows.items():
        m = np.mean(parts, axis=0)
        pairs = "".join(f"{f'{a:.2f} {b:.2f}':>14}" for a, b in m[2:].reshape(-1, 2))
        print(f"{name:10}{m[0]:7.2f}{m[1]:6.2f}{pairs}")


if __name__ == "__main__":
    main()
