"""Random sketches of whole gradients, drawn once from named seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Context, UsageError

if TYPE_CHECKING:
    import torch

    from tdabench.api import GradientEngine, Layer

KINDS = ("sparse", "rademacher", "normal")
_BLOCK = 1 << 14  # parameters per block of a dense sketch


class SparseSketch:
    """A sparse Johnson-Lindenstrauss transform of vectors [b, n] to [b, dim].

    Every number is added with a random sign to one of `dim` sums; the sums have equal numbers of
    terms, up to one. Two numbers share a sum with probability at most 1 / dim, as with independent
    draws (Charikar et al. 2002), so inner products are preserved equally well. Since the numbers
    are reordered by sum, they are added row by row, in half the time.
    """

    def __init__(self, n: int, dim: int, generator: torch.Generator, device: str) -> None:
        import torch

        from tdabench.api import Workspace

        self.dim = dim
        # 32-bit indices: reading them is the cost of reordering.
        self.order = torch.randperm(n, generator=generator).int().to(device)
        self.signs = (torch.randint(2, (n,), generator=generator).float() * 2 - 1).to(device)
        self.whole = n - n % dim
        self.last = torch.randperm(dim, generator=generator)[: n % dim].to(device)
        self.workspace = Workspace()

    def add(self, vectors: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the sketches of `vectors` [b, n] to `out` [b, dim]."""
        import torch

        moved = self.workspace.empty(vectors, *vectors.shape)
        torch.index_select(vectors, 1, self.order, out=moved)
        moved.mul_(self.signs)
        out += moved[:, : self.whole].view(len(moved), -1, self.dim).sum(1)
        out.index_add_(1, self.last, moved[:, self.whole :])


class Sketch:
    """P^T g for gradients g [b, parameters], layer after layer, with E[P P^T] = I.

    sparse      one `SparseSketch` per layer, linear in the number of parameters
    rademacher  dense signs
    normal      dense Gaussian numbers

    Dense sketches are drawn once, block by block, into a file in the method's scratch folder and
    mapped from there, so that only one block of 2^14 parameters is in memory.
    """

    def __init__(self, context: Context, engine: GradientEngine, dim: int, kind: str) -> None:
        if kind not in KINDS:
            raise UsageError(f"unknown sketch {kind!r}", f"One of: {', '.join(KINDS)}")
        self.dim, self.kind = dim, kind
        self.blocks: dict[str, Any] = {}
        for layer in engine.layers:
            generator = context.torch_generator(f"sketch/{kind}/{layer.name}")
            if kind == "sparse":
                self.blocks[layer.name] = SparseSketch(layer.dim, dim, generator, context.device)
            else:
                name = f"sketch-{kind}-{context.seed}-{dim}-{layer.start}-{layer.dim}.bin"
                self.blocks[layer.name] = _dense(
                    context.scratch / name, layer.dim, dim, kind, generator
                )

    def add(self, layer: Layer, gradients: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the sketch of one layer's gradients [b, layer dim] to `out` [b, dim]."""
        import torch

        if self.kind == "sparse":
            self.blocks[layer.name].add(gradients, out)
            return
        p = self.blocks[layer.name]
        for a in range(0, len(p), _BLOCK):
            part = torch.from_numpy(np.array(p[a : a + _BLOCK], dtype=np.float32)).to(out.device)
            out += gradients[:, a : a + _BLOCK] @ part / self.dim**0.5


def _dense(path: Path, n: int, dim: int, kind: str, generator: torch.Generator) -> np.memmap:
    import torch

    dtype = np.int8 if kind == "rademacher" else np.float32
    if not path.exists():
        part = path.with_suffix(".part")
        drawn = np.memmap(part, dtype=dtype, mode="w+", shape=(n, dim))
        for a in range(0, n, _BLOCK):
            size = (min(_BLOCK, n - a), dim)
            if kind == "rademacher":
                block = torch.randint(2, size, generator=generator, dtype=torch.int8) * 2 - 1
            else:
                block = torch.randn(size, generator=generator)
            drawn[a : a + _BLOCK] = block.numpy()
        drawn.flush()
        part.rename(path)
    return np.memmap(path, dtype=dtype, mode="r", shape=(n, dim))
