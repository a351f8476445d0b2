"""Per-example gradients of a language model's linear layers, in one forward and backward pass.

For a linear layer y_t = W x_t the gradient of example i's loss is sum_t delta_t x_t^T, with
delta_t = d loss_i / d y_t. Hooks record x in the forward and delta in the backward pass. Weights
are frozen, so that autograd computes no weight gradients, and the backward pass ends at the first
selected layers. The passes run on the *sum* of per-example losses, so each example's delta belongs
to its own loss, independent of its batch. With projections the hooks keep only x P_in, and form
P_out^T (sum_t delta_t x_t^T) P_in from it (LoGra, arXiv 2405.13954): neither activations nor full
gradients are stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from tdabench.data.examples import Example
from tdabench.errors import MethodError, UsageError, unknown
from tdabench.io import fingerprint
from tdabench.method import Context
from tdabench.rows import Rows
from tdabench.targets.batches import Batch, Tokens, out_of_memory, over_batches, pad
from tdabench.targets.products import fast_products
from tdabench.targets.target import example_losses
from tdabench.toolkit.coverage import coverage, covered, in_use
from tdabench.toolkit.experts import expert_modules, expert_shapes, watched
from tdabench.toolkit.store import FeatureStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [  # what tdabench.api passes on
    "GradientEngine",
    "Layer",
    "Workspace",
    "example_blocks",
    "layer_sums",
    "map_batches",
    "per_example",
    "second_moment",
    "select_layers",
    "stream_features",
]

Loss = Callable[[Any, Batch], Tensor]  # (model, batch) -> [b]
Visit = Callable[["Layer", Tensor, Tensor], None]  # (layer, x [b, t, in], delta [b, t, out])
Projections = Mapping[str, tuple[np.ndarray | None, np.ndarray | None]]

IN_MEMORY_BYTES = 512 << 20
WINDOW = 65_536  # examples tokenised at a time
TOKENS_A_BATCH = {"cpu": 4096, "cuda": 16_384}  # a GPU starts slowly and computes quickly
_CACHED = 1 << 20  # bytes of gradients that fit in a CPU's L2 cache
_STRIP = 128  # rows of a second moment at a time
_WIDE_PRODUCTS = hasattr(torch.ops.aten.bmm, "dtype")  # since torch 2.8


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer: its weight gradient is [d_out, d_in]; a bias is the last column of d_in.

    `p_out` [d_out, r] and `p_in` [d_in, r] project either side; None leaves the side unchanged.
    The features of the layer are `features[:, start : start + dim]`, [rows, cols] row-major.
    """

    name: str
    module: torch.nn.Module
    d_in: int
    d_out: int
    bias: bool
    conv1d: bool
    p_in: Tensor | None = None
    p_out: Tensor | None = None
    start: int = 0
    weight: str = ""  # for experts: the name of the tensor [expert, …] in `module`
    expert: int = 0

    @property
    def rows(self) -> int:
        return self.d_out if self.p_out is None else self.p_out.shape[1]

    @property
    def cols(self) -> int:
        return self.d_in if self.p_in is None else self.p_in.shape[1]

    @property
    def dim(self) -> int:
        return self.rows * self.cols

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.dim)


class GradientEngine:
    """Per-example gradients of `model`, which is left unchanged.

    layers      regular expression searched in layer names; None selects every linear layer except
                the output head
    rank        dimensions to which each side of each layer is projected (a side that is not larger
                stays unchanged); None keeps whole gradients
    projection  "random": Gaussian with variance 1/rank, which preserves inner products in
                expectation, drawn from `random(name)`; or a mapping from layer names to
                (p_in [d_in, r], p_out [d_out, r])
    random      a function from a name to a seeded generator: `context.torch_generator`
    bias        include the gradients of biases, if a layer has one
    loss        (model, batch) -> [b], the quantity to differentiate; by default the mean
                response-token loss
    experts     include the experts of a mixture, one layer per expert and weight; their
                `layer.module` is the module that contains all experts

    `coverage` is the share of the model's weights that the gradients cover.

    Raises UsageError if no layer matches, and MethodError for a quantised model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layers: str | None = None,
        rank: int | None = None,
        projection: Literal["random"] | Projections = "random",
        random: Callable[[str], torch.Generator] | None = None,
        bias: bool = False,
        loss: Loss = example_losses,
        experts: bool = True,
    ) -> None:
        self.model, self.loss = model, loss
        self._sides: dict[tuple[int, torch.dtype], Tensor] = {}
        if rank is not None and rank < 1:
            raise UsageError(f"a projection rank must be at least 1, not {rank}")
        device = next(model.parameters()).device
        self.layers: list[Layer] = []
        start = 0
        for name, module, weight, expert in _products(model, layers, experts):
            conv1d = not weight and not isinstance(module, torch.nn.Linear)
            if weight:
                _, d_out, d_in = expert_shapes(module)[weight]
                has_bias = bias and bool(module.has_bias)
            else:
                shape = tuple(module.get_parameter("weight").shape)
                d_out, d_in = shape[::-1] if conv1d else shape
                has_bias = bias and module.bias is not None
            sides: list[Tensor | None]
            if not isinstance(projection, str):
                if name not in projection:
                    raise unknown("layer in the given projections", name, projection)
                sides = [None if p is None else torch.as_tensor(p) for p in projection[name]]
            else:
                if projection != "random":
                    raise UsageError(f"unknown projection {projection!r}", "One of: random")
                widths = (("in", d_in + has_bias), ("out", d_out))
                sides = [_draw(random, f"projection/{name}/{s}", d, rank) for s, d in widths]
            p_in, p_out = (p if p is None else p.to(device, torch.float32) for p in sides)
            layer = Layer(
                name, module, d_in + has_bias, d_out, has_bias, conv1d, p_in, p_out, start,
                weight, expert,
            )  # fmt: skip
            for p, d in ((p_in, layer.d_in), (p_out, layer.d_out)):
                if p is not None and p.shape[0] != d:
                    raise UsageError(f"the projection of {name} has {p.shape[0]} rows, not {d}")
            self.layers.append(layer)
            start += layer.dim
        self.dim = start
        self._experts = {
            (id(layer.module), layer.weight, layer.expert): layer
            for layer in self.layers
            if layer.weight
        }
        if hasattr(model, "config"):
            self.coverage = coverage(model, self._parameters(), layers is not None)
            covered.append(self.coverage)

    def _parameters(self) -> set[str]:
        """Returns the names of the parameters that the gradients cover."""
        found = set()
        for layer in self.layers:
            weight = layer.weight or "weight"
            owner = layer.name.removesuffix(f".{weight}.{layer.expert}")
            found.add(f"{owner}.{weight}")
            if layer.bias:
                found.add(f"{owner}.{weight}_bias" if layer.weight else f"{owner}.bias")
        return found

    @property
    def dims(self) -> dict[str, int]:
        """Number of features per layer, in order."""
        return {layer.name: layer.dim for layer in self.layers}

    # ------------------------------------------------------------------ passes

    def backward(self, batch: Batch, visit: Visit, loss: Loss | None = None) -> Tensor:
        """Runs one forward and backward pass; `visit` receives each layer's inputs and deltas.

        `visit(layer, x, delta)` gets x [b, t, d_in] (with a bias, the last column is ones) and
        delta [b, t, d_out] in the model's dtype, last layer first. delta is zero at padding, so
        that products of the two count only real tokens; x is meaningless there (`second_moment`
        excludes it). Returns the losses [b], detached.
        """
        return self._pass(batch, _with_ones, visit, loss)

    def gradients(self, batch: Batch) -> Tensor:
        """Computes gradients of each example's loss, with any projection: float32 [b, dim]."""
        b = len(batch.input_ids)
        out = torch.empty(b, self.dim, device=batch.input_ids.device)
        first: set[str] = set()

        def keep(layer: Layer, x: Tensor) -> Tensor:
            if layer.p_in is None:
                return _with_ones(layer, x)
            p = self._side(layer.p_in, x.dtype)
            if layer.bias:
                return torch.nn.functional.linear(x, p[:-1].T, p[-1])
            return x @ p  # [b, t, cols]

        def visit(layer: Layer, x: Tensor, delta: Tensor) -> None:
            if layer.p_out is not None:
                delta = delta @ self._side(layer.p_out, delta.dtype)  # [b, t, rows]
            g = _outer(delta, x).view(b, -1)
            if layer.name in first:  # the gradients of a module used twice add up
                out[:, layer.columns] += g
            else:
                first.add(layer.name)
                out[:, layer.columns] = g

        self._pass(batch, keep, visit, None)
        return out

    def _side(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a projection in the dtype of its operand, converted once."""
        if p.dtype == dtype:
            return p
        key = id(p), dtype
        if key not in self._sides:
            self._sides[key] = p.to(dtype)
        return self._sides[key]

    def _pass(
        self,
        batch: Batch,
        keep: Callable[[Layer, Tensor], Tensor],
        visit: Visit,
        loss: Loss | None,
    ) -> Tensor:
        """Runs the passes: `keep(layer, x)` is the part of x to hold until `visit` gets delta."""
        seen: set[str] = set()
        odd = _odd_padding(batch)
        tokens = batch.input_ids.numel()

        def received(layer: Layer, kept: Tensor, delta: Tensor) -> None:
            seen.add(layer.name)
            visit(layer, kept, _without(odd, _by_position(layer, delta, batch)))

        def forward_hook(layer: Layer, _module: Any, inputs: tuple, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # this call does not contribute to the gradient
                return output
            output = _differentiable(output)
            kept = keep(layer, _without(odd, _by_position(layer, inputs[0].detach(), batch)))
            output.register_hook(partial(received, layer, kept))
            return output

        def routed(layer: Layer, kept: Tensor, rows: Tensor, delta: Tensor) -> None:
            seen.add(layer.name)
            # A token routed to one expert twice has the same x both times, and two deltas.
            visit(layer, _scattered(kept, rows, batch), _scattered(delta, rows, batch, add=True))

        def product(
            module: Any, weight: str, expert: int, n: int, rows: Tensor, x: Tensor, y: Tensor
        ) -> Tensor:
            layer = self._experts.get((id(module), weight, expert))
            if layer is None:
                return y
            if n != tokens:
                raise MethodError(
                    f"{layer.name} sees {n} tokens of {tokens}",
                    "Exclude it with the parameter `layers`",
                )
            y, x = _differentiable(y), x.detach()
            real = ... if odd is None else (~odd.flatten())[rows].nonzero()[:, 0]
            kept = keep(layer, x[real][None])[0]
            y.register_hook(lambda delta: routed(layer, kept, rows[real], delta[real]))
            return y

        modules = {layer.name: layer.module for layer in self._experts.values()}
        with (
            _frozen(self.model),
            _plain_attention(self.model, batch),
            fast_products(self.model, batch.input_ids.shape[1]),
            watched(modules, product),
            torch.enable_grad(),
        ):
            hooks = [
                layer.module.register_forward_hook(partial(forward_hook, layer))
                for layer in self.layers
                if not layer.weight
            ]
            try:
                losses = (loss or self.loss)(self.model, batch)
                losses.sum().backward()
            finally:
                for hook in hooks:
                    hook.remove()
        unseen = [layer for layer in self.layers if layer.name not in seen]
        nowhere = torch.zeros(0, dtype=torch.long, device=batch.input_ids.device)
        for layer in unseen:
            if layer.weight:  # an expert that received no token of the batch
                x = losses.new_zeros(1, 0, layer.d_in - layer.bias)
                delta = losses.new_zeros(0, layer.d_out)
                routed(layer, keep(layer, x)[0].detach(), nowhere, delta)
        lost = [layer.name for layer in unseen if not layer.weight]
        if lost:
            raise MethodError(
                f"no gradient reached {lost[0]} ({len(lost)} layers in all)",
                "Exclude such layers with the parameter `layers`",
            )
        return losses.detach()

    def features(self, batches: Iterator[Batch]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yields (index [b], gradients [b, dim]) of each batch."""
        for batch in batches:
            yield batch.index, self.gradients(batch)

    def split(self, features: Any) -> dict[str, Any]:
        """Splits features [n, dim] into views per layer: {name: [n, layer dim]}."""
        return {layer.name: features[:, layer.columns] for layer in self.layers}


class Workspace:
    """Memory for one float32 tensor at a time, reused from batch to batch.

    Fresh memory pages cost a CPU about as much time as the product that fills them. A result that
    is consumed before the next layer is visited can therefore be overwritten.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """Returns a tensor of that shape on the device of `like`; invalidates the previous one."""
        n = math.prod(shape)
        if self._memory is None or len(self._memory) < n or self._memory.device != like.device:
            self._memory = None  # free the old one first
            self._memory = torch.empty(n, device=like.device)
        return self._memory[:n].view(shape)


def per_example(
    layer: Layer, x: Tensor, delta: Tensor, out: Workspace | Tensor | None = None
) -> Tensor:
    """Computes P_out^T (sum_t delta_t x_t^T) P_in of each example: float32 [b, rows, cols].

    The result is stored in `out`: in that tensor, or in a workspace until that is used again.
    """
    # Projecting tokens first costs t r (d_in + d_out); forming the gradient first t d_in d_out.
    if layer.p_in is not None:
        x = x @ layer.p_in.to(x.dtype)  # [b, t, cols]
    if layer.p_out is not None:
        delta = delta @ layer.p_out.to(delta.dtype)  # [b, t, rows]
    if isinstance(out, Workspace):
        out = out.empty(x, len(x), delta.shape[2], x.shape[2])
    return _outer(delta, x, out)


def example_blocks(
    layer: Layer, x: Tensor, delta: Tensor, workspace: Workspace
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (positions, `per_example`) a few examples at a time, valid until the next.

    Further use of each number is faster while it is in the CPU's cache.
    """
    step = len(x) if x.is_cuda else max(1, _CACHED // (4 * layer.dim))
    for a in range(0, len(x), step):
        part = slice(a, min(a + step, len(x)))
        yield part, per_example(layer, x[part], delta[part], workspace)


def second_moment(v: Tensor, batch: Batch) -> Tensor:
    """Sums v_t v_t^T over the real tokens of a batch: float32 [d, d] of v [b, t, d]."""
    flat = v.flatten(0, 1)
    if batch.real_tokens is not None and len(flat) == batch.input_ids.numel():
        flat = flat[batch.real_tokens]
    d = flat.shape[1]
    if flat.is_cuda or d < 2 * _STRIP:
        return _outer(flat[None], flat[None])[0]
    # A CPU is as fast on a strip of rows, and half of a symmetric matrix is enough.
    flat = flat.float()
    out = flat.new_empty(d, d)
    for a in range(0, d, _STRIP):
        b = min(a + _STRIP, d)
        out[a:b, a:] = flat[:, a:b].T @ flat[:, a:]
        out[b:, a:b] = out[a:b, b:].T
    return out


def _outer(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Computes a^T b of each example, float32 [b, p, q] of a [b, t, p] and b [b, t, q].

    Products of half-precision numbers are exact in float32, in which a GPU accumulates them:
    converting operands first gives the same result more slowly.
    """
    a = a.transpose(1, 2)
    half = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    if half and a.is_cuda and _WIDE_PRODUCTS:
        if out is None:
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a, b, out_dtype=torch.float32, out=out)
    return torch.bmm(a.float(), b.float(), out=out)


def select_layers(
    model: torch.nn.Module, layers: str | None = None
) -> list[tuple[str, torch.nn.Module]]:
    """Returns (name, module) of the linear layers of `model` whose names match `layers`.

    None selects all except the output head and the layers that a forward pass does not apply to
    every token in its place (experts that are modules, the cross-attention of a decoder without
    an encoder). Covers nn.Linear and the Conv1D of GPT-2.
    """
    chosen = [(name, module) for name, module, *_ in _products(model, layers, experts=False)]
    if hasattr(model, "config"):  # for the record: other packages do not say what they cover
        names = {f"{name}.weight" for name, _ in chosen}
        covered.append(coverage(model, names, layers is not None))
    return chosen


def _products(
    model: torch.nn.Module, layers: str | None, experts: bool
) -> list[tuple[str, torch.nn.Module, str, int]]:
    """Returns (name, module, "", 0) per linear layer, (name, module, weight, expert) per expert."""
    from transformers.pytorch_utils import Conv1D

    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    if getattr(model, "is_quantized", False) or any(
        not m.weight.is_floating_point() for m in linear.values()
    ):
        raise MethodError(
            "the model is quantised: its weights have no gradients",
            "Load the target in float32, float16 or bfloat16",
        )
    if not linear:
        raise UsageError(f"{type(model).__name__} has no linear layers for gradients")
    there: dict[str, tuple[str, torch.nn.Module, str, int]] = {
        n: (n, m, "", 0) for n, m in linear.items()
    }
    if experts:
        for name, module in expert_modules(model).items():
            for weight, (count, _, _) in expert_shapes(module).items():
                for e in range(count):
                    there[f"{name}.{weight}.{e}"] = f"{name}.{weight}.{e}", module, weight, e
    if layers is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [v for v in there.values() if v[1] is not head]
        if hasattr(model, "config"):
            use = in_use(model)
            names = {id(m): n for n, m in model.named_modules()}
            chosen = [v for v in chosen if names[id(v[1])] in use.placed]
    else:
        try:
            pattern = re.compile(layers)
        except re.error as e:
            raise UsageError(f"layers = {layers!r} is not a regular expression: {e}") from e
        chosen = [v for n, v in there.items() if pattern.search(n)]
    if not chosen and layers is None:
        raise MethodError(
            f"per-example gradients of {type(model).__name__} are not supported: its forward pass "
            f"applies none of its {len(there)} linear layers to every token with gradients",
            "Use a method without gradients",
        )
    if not chosen:
        some = ", ".join(list(there)[:3])
        raise UsageError(
            f"no linear layer matches layers = {layers!r}",
            f"The model has {len(there)}: {some}{', …' if len(there) > 3 else ''}",
        )
    return chosen


def _draw(
    random: Callable[[str], torch.Generator] | None, name: str, d: int, rank: int | None
) -> Tensor | None:
    if rank is None or d <= rank:
        return None
    if random is None:
        raise UsageError(
            "a random projection needs a seeded generator", "Pass random=context.torch_generator"
        )
    return torch.randn(d, rank, generator=random(name)) / rank**0.5


def _odd_padding(batch: Batch) -> Tensor | None:
    """Returns True at padding [b, t, 1] if its values may be NaN, else None.

    Right padding needs no mask: no later token attends to it, so delta is zero there and x is
    finite. With left padding, whole rows of attention are masked.
    """
    return ~batch.attention_mask.bool()[..., None] if batch.padded_left else None


def _without(odd: Tensor | None, v: Tensor) -> Tensor:
    """Returns `v` with zeros at `odd` padding."""
    if odd is None:
        return v
    return v.masked_fill(odd.repeat_interleave(v.shape[1] // odd.shape[1], dim=1), 0)


def _with_ones(layer: Layer, x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2) if layer.bias else x


def _by_position(layer: Layer, v: Tensor, batch: Batch) -> Tensor:
    """Returns `v` as [b, t, d]: some layers flatten tokens; the head sees only responses.

    Layers that see attention heads separately give [b, t * heads, d]; gradients sum over both.
    """
    b, t = batch.input_ids.shape
    if v.dim() == 3 and v.shape[0] == b:
        return v
    if v.dim() == 2 and v.shape[0] == b * t:
        return v.view(b, t, -1)
    if v.dim() == 2 and v.shape[0] == len(batch.places):
        return v.new_zeros(b * t, v.shape[1]).index_copy_(0, batch.places, v).view(b, t, -1)
    if v.dim() > 3 and v.shape[0] == b:
        return v.flatten(1, -2)
    raise MethodError(
        f"{layer.name} mixes examples: it sees {list(v.shape)} for a batch of {b} x {t} tokens",
        "Exclude such layers (such as experts) with the parameter `layers`",
    )


def _scattered(v: Tensor, rows: Tensor, batch: Batch, add: bool = False) -> Tensor:
    """Returns v [n, c] at `rows` [n] of the b * t tokens as [b, t, c], zeros elsewhere."""
    b, t = batch.input_ids.shape
    out = v.new_zeros(b * t, v.shape[1])
    return (out.index_add_ if add else out.index_copy_)(0, rows, v).view(b, t, -1)


def _differentiable(output: Tensor) -> Tensor:
    """Returns `output`, or a new start of the graph if no earlier layer requires a gradient.

    The backward pass then ends here. It is a copy, because some models write into it.
    """
    return output if output.requires_grad else output.detach().requires_grad_().clone()


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Sets eval mode without weight gradients within the context, and restores the model after."""
    training = [(m, m.training) for m in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for m, mode in training:
            m.training = mode


@contextmanager
def _plain_attention(model: Any, batch: Batch) -> Iterator[None]:
    """Computes attention as plain products where torch's fused kernel is slow.

    This is the backward pass in half precision on a CPU. Plain products hold the scores of all
    pairs of tokens, so long sequences keep the kernel."""
    weight = next(model.parameters())
    slow = (
        weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float16)
        and batch.input_ids.shape[1] <= 1024
        and getattr(model.config, "_attn_implementation", "") == "sdpa"
    )
    if not slow:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


# --------------------------------------------------------------------------- over a corpus


def map_batches(
    context: Context,
    tokens: Sequence[Tokens],
    compute: Callable[[Batch], Any],
    *,
    what: str = "gradients",
    tokens_a_batch: int | None = None,
    max_examples: int = 256,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields (index [b], compute(batch)) over all of `tokens`, in batches of similar length.

    `batch.index` in `compute` equals `index`: positions in `tokens`.

    When memory runs out the batch is halved, for the rest of the pass, and `context.progress` is
    called; raises MethodError if a single example does not fit. `tokens_a_batch` (including
    padding) is chosen by device by default.
    """
    kind = context.device.partition(":")[0]
    budget = tokens_a_batch or TOKENS_A_BATCH.get(kind, TOKENS_A_BATCH["cuda"])
    done = 0

    def run(index: np.ndarray) -> Any:
        batch = pad(tokens, index, context.target.pad_id).to(context.device)
        try:
            return compute(batch)
        except (RuntimeError, MemoryError) as e:
            if len(index) > 1 or not out_of_memory(e):
                raise
            raise MethodError(
                f"out of memory on one example of {len(tokens[int(index[0])])} tokens",
                "Lower the rank, choose fewer layers, or use a larger machine",
            ) from e

    def halved(most: int) -> None:
        context.progress(f"out of memory: batches of {what} halved to {most}", done, len(tokens))

    lengths = [len(t) for t in tokens]
    for index, result in over_batches(lengths, run, budget, max_examples, halved):
        yield index, result
        done += len(index)
        context.progress(what, done, len(tokens))


Moment = Callable[[Layer, Tensor, Tensor, Batch], tuple[Tensor, ...]]


def layer_sums(
    context: Context,
    engine: GradientEngine,
    tokens: Sequence[Tokens],
    moment: Moment,
    *,
    loss: Loss | None = None,
    what: str = "moments",
) -> dict[str, tuple[Tensor, ...]]:
    """Sums `moment(layer, x, delta, batch)` over a corpus, by layer name: float64.

    `x` and `delta` are as in `GradientEngine.backward`; `loss` replaces the engine's loss. Sums
    stay on the device, since for a large model they are gigabytes per batch. Without tokens the
    result is empty.
    """
    sums: dict[str, tuple[Tensor, ...]] = {}

    def compute(batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        found: dict[str, tuple[Tensor, ...]] = {}

        def visit(layer: Layer, x: Tensor, delta: Tensor) -> None:
            parts = moment(layer, x, delta, batch)
            if layer.name in found:  # a module used twice
                parts = tuple(a + b for a, b in zip(found[layer.name], parts))
            found[layer.name] = parts

        engine.backward(batch, visit, loss)
        return found

    # Added outside of `compute`, since a batch that runs out of memory midway is retried.
    for _, found in map_batches(context, tokens, compute, what=what):
        for name, parts in found.items():
            if name not in sums:
                sums[name] = tuple(torch.zeros_like(p, dtype=torch.float64) for p in parts)
            for total, part in zip(sums[name], parts):
                total.add_(part)
    return sums


def _content(examples: Sequence[Example]) -> str:
    return fingerprint([[e.id, e.prompt, e.response] for e in examples])


def stream_features(
    context: Context,
    examples: Sequence[Example],
    compute: Callable[[Batch], Tensor],
    dim: int,
    *,
    name: str = "features",
    key: Any = None,
    dtype: str = "float32",
    tokens_a_batch: int | None = None,
) -> Rows:
    """Computes features [example, dim] from `compute(batch) -> [b, dim]` over sorted batches.

    Features are in memory if they fit in 512 MiB of float32, else in a `FeatureStore` of `dtype` in
    `context.scratch / name`. With a `key` (everything that determines the features, as JSON), an
    interrupted store is continued. Raises MethodError naming the example whose features are not
    finite.
    """
    n = len(examples)
    # Unprojected features can exceed activations: a batch holds at most 256 MiB of them.
    most = max(1, min(256, (256 << 20) // (4 * max(1, dim))))
    store, rows = None, None
    todo = np.arange(n)
    if dtype == "float32" and 4 * n * dim <= IN_MEMORY_BYTES:
        rows = np.empty((n, dim), dtype=np.float32)
    else:
        identity = [context.target.fingerprint, context.seed, dim, key]
        identity.append(getattr(examples, "fingerprint", None) or _content(examples))
        path = context.scratch / name
        store = FeatureStore.create(
            path, n, dim, dtype, "" if key is None else fingerprint(identity)
        )
        todo = store.missing
    # Tokenised in windows: a corpus may stay on disk and be larger than memory.
    for part in np.split(todo, range(WINDOW, len(todo), WINDOW)):

        def rows_of(batch: Batch, part: np.ndarray = part) -> torch.Tensor:
            return compute(batch.numbered(part[batch.index]))

        sequences = context.target.tokenize([examples[int(i)] for i in part])
        for index, block in map_batches(
            context,
            sequences,
            rows_of,
            what=name,
            tokens_a_batch=tokens_a_batch,
            max_examples=most,
        ):
            at = part[index]
            values = block.detach().float().cpu().numpy()
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                bad = examples[int(at[~finite][0])]
                raise MethodError(
                    f"NaN or infinite gradients for {(~finite).sum()} examples, first {bad.id!r}",
                    "Check that example's loss under the target: an overflow in float16, or a "
                    "checkpoint that diverged",
                )
            if store is not None:
                store.write(at, values)
            elif rows is not None:
                rows[at] = values
    if store is not None:
        store.close()
        return store
    assert rows is not None
    return rows
