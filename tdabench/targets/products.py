"""Float32 matrix products on the CPU, by the faster of the two libraries that torch contains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PLAIN_ATTENTION = 128  # tokens up to which attention as two products is faster than a fused kernel


@contextmanager
def fast_products(model: PreTrainedModel | None = None, length: int = 0) -> Iterator[None]:
    """Computes float32 products on a CPU with oneDNN within the context, where that is faster.

    torch passes float32 products to MKL, which uses AVX-512 on Intel's processors only. On others
    that have AVX-512, oneDNN takes half to a third of the time with equally exact results (relative
    rounding errors near 1e-6). Elsewhere, and for other dtypes, nothing changes.

    torch's fused attention on a CPU multiplies in blocks that are too small for oneDNN: with a
    `model` on sequences of at most 128 tokens (`length`), attention is computed as plain products
    within the context.
    """
    if not onednn_is_faster() or (model is not None and _device(model) != "cpu"):
        yield
        return
    import torch

    onednn: Any = torch.backends.mkldnn
    setting = onednn.matmul
    before = setting.fp32_precision
    attention = model if length <= PLAIN_ATTENTION and _fused(model) else None
    if attention is not None:
        attention.set_attn_implementation("eager")
    # A permission to round factors to bfloat16, for which torch asks oneDNN. It only does so on
    # matrix units, and `onednn_is_faster` is False on processors that have one.
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
        if attention is not None:
            attention.set_attn_implementation("sdpa")


def product(a: Tensor, b: Tensor) -> Tensor:
    """Computes a [n, k] @ b [k, m] of float32 on a CPU like `fast_products`.

    It calls oneDNN's linear operator, which reads operands of any layout, so that no context is
    needed. oneDNN compiles a routine for every new shape, which takes 0.5 to 1 ms, and keeps 1,024.
    """
    import torch

    linear = _linear()
    return torch.mm(a, b) if linear is None else linear(a, b.t(), None, "none", [], "")


@cache
def _linear() -> Any:
    """Returns torch's operator x, w -> x @ w.T by oneDNN; None where it is absent or no faster."""
    import torch

    if not onednn_is_faster():
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        a, b = torch.linspace(-1, 1, 15).view(3, 5), torch.linspace(-2, 1, 20).view(5, 4)
        found = linear(a, b.t(), None, "none", [], "")
        return linear if torch.allclose(found, a @ b, atol=1e-4) else None
    except (AttributeError, RuntimeError, TypeError):  # an operator that torch does not document
        return None


def _device(model: Any) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _fused(model: Any) -> bool:
    """Tells whether a float32 model computes attention with torch's fused kernel."""
    config = getattr(model, "config", None)
    return (
        getattr(config, "_attn_implementation", "") == "sdpa"
        # The kernel does not cap scores, plain products do: they would be two models.
        and getattr(config, "attn_logit_softcapping", None) is None
        and next(model.parameters()).element_size() == 4
    )


@cache
def onednn_is_faster() -> bool:
    """Tells whether oneDNN computes float32 products faster here than MKL, and as exactly.

    It is a property of processor and packages, not a measurement of time: the same machine always
    computes in the same way.
    """
    import torch

    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if (
        not hasattr(setting, "fp32_precision")  # since torch 2.9
        or not torch.backends.mkldnn.is_available()
        or not torch.backends.mkl.is_available()
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
        or _made_by_intel()
    ):
        return False
    # Of numbers that bfloat16 does not hold; 33 terms, so that the exact sum is known.
    a = torch.full((128, 33), 1 + 2**-12)
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        found = a @ a.T
    finally:
        setting.fp32_precision = before
    exact = 33 * (1 + 2**-12) ** 2
    return bool((found - exact).abs().max() <= 1e-5 * exact)


def _made_by_intel() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return any("GenuineIntel" in line for line in file)
    except OSError:  # not Linux
        return True
