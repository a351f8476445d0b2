"""Losses and gradients of Llama-like decoders on a CPU, with the backward pass written out.

Retraining a small model on a CPU spends more than half of its time outside of matrix products, in
autograd, small operators and memory. This module computes the same losses and gradients (equal up
to rounding) with fewer and larger operators, for the architectures in `SERVED`:

- Activations are stored features first, [feature, token]: a norm, a rotation or a bias is then one
  operator over contiguous tokens, and no product of the forward or backward pass needs a copy.
- q, k and v, and gate and up, are one product each.
- Batches are cut by length into parts that stay in a core's cache (`cut`).
- After attention, the last layer and the output matrix are computed at response positions only.
- Weights and gradients of a model in training lie in one vector each: the optimizer and clipping
  are one pass.
- Low-rank adapters are merged into the weights once per step; only their gradients are computed,
  and nothing below the first of them. States that enter it are the base model's in every
  retraining: `States` holds them, and passes begin there.

`Decoder.of` returns None for any other model: the caller then uses the model's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from tdabench.targets.batches import Batch
from tdabench.targets.forward import configuration_key, logits_at, moved, probe_ids
from tdabench.targets.lora import LoRA
from tdabench.targets.products import product

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

SERVED = ("LlamaForCausalLM", "Qwen2ForCausalLM")
LONGEST = 512  # tokens per example; beyond it, fused attention needs less memory and time
TOKENS = 768  # per part, with padding: more leave the cache, fewer cost more calls
_EXTRA = 64  # what a part costs beyond its tokens, in tokens
_COLUMNS = 64  # tokens of a product are padded to a multiple, since every new shape is compiled
_SMALL = 1 << 24  # weights of a model whose transposes are kept during a step

_LARGEST = 200_000_000  # weights; beyond it products are most of the time, and memory is scarce
_ROPES = ("default", "linear", "llama3", "yarn")  # the angles depend on the position only
_agrees: dict[tuple[str, bool], bool] = {}  # by configuration, and whether gradients were compared


class _Layer(NamedTuple):
    """The weights of one layer, or their gradients; n heads and m key-value heads of size h."""

    norm_in: Tensor  # [d]
    qkv: Tensor  # [(n + 2 m) h, d]
    bias: Tensor | None  # [(n + 2 m) h]
    out: Tensor  # [d, n h]
    norm_mid: Tensor  # [d]
    gate_up: Tensor  # [2 f, d]
    down: Tensor  # [d, f]


class _Kept(NamedTuple):
    """Activations of one layer that its backward pass reads; c tokens, b x t in attention."""

    scale_in: Tensor  # [c]
    unit_in: Tensor  # [d, c], normalised
    seen: Tensor  # [d, c], times the norm's weight
    q: Tensor  # [m b, h, (n / m) t]
    k: Tensor  # [m b, h, t]
    v: Tensor  # [m b, h, t]
    p: Tensor  # [m b, t, (n / m) t]: attention of a query (last) to each key
    mixed: Tensor  # [n h, c']; from here on, c' tokens: responses only in the last layer
    scale_mid: Tensor  # [c']
    unit_mid: Tensor  # [d, c']
    read: Tensor  # [d, c']
    gate: Tensor  # [f, c']
    up: Tensor  # [f, c']
    opened: Tensor  # [f, c'], silu(gate)
    hidden: Tensor  # [f, c'], silu(gate) * up


class _Adapter(NamedTuple):
    """An adapter's share in the weights of a group: scale B A in these rows."""

    rows: slice
    a: torch.nn.Parameter  # [rank, d_in]
    b: torch.nn.Parameter  # [rows, rank]
    scale: float


class States(NamedTuple):
    """The hidden states that enter layer `first`, for each of a sequence of examples.

    They are the same in every model whose layers below `first`, and embeddings, are the base's.
    """

    first: int
    of: Sequence[Tensor]  # [d, length] each

    def at(self, index: Sequence[int] | np.ndarray) -> States:
        """Returns the states of the examples at `index`."""
        return States(self.first, [self.of[i] for i in index])


class Decoder:
    """The written-out passes of one model, which they read and never change.

    Within `training()`, the model's parameters are views of `weights`, a vector whose gradient
    `gradient` accumulates; within `adapting(lora)`, it accumulates the gradients of A and B.
    """

    weights: torch.nn.Parameter  # [every weight], within `training`

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        self.model = model
        self.n, self.m = config.num_attention_heads, config.num_key_value_heads
        self.h = getattr(config, "head_dim", None) or config.hidden_size // self.n
        self.d, self.f, self.eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        body: Any = model.model
        self.groups: dict[str, list[torch.nn.Parameter]] = {"embed": [body.embed_tokens.weight]}
        for i, layer in enumerate(body.layers):
            a, f = layer.self_attn, layer.mlp
            self.groups |= {
                f"{i}.norm_in": [layer.input_layernorm.weight],
                f"{i}.qkv": [a.q_proj.weight, a.k_proj.weight, a.v_proj.weight],
                f"{i}.bias": [p.bias for p in (a.q_proj, a.k_proj, a.v_proj) if p.bias is not None],
                f"{i}.out": [a.o_proj.weight],
                f"{i}.norm_mid": [layer.post_attention_layernorm.weight],
                f"{i}.gate_up": [f.gate_proj.weight, f.up_proj.weight],
                f"{i}.down": [f.down_proj.weight],
            }
        self.groups["norm"] = [body.norm.weight]
        head = cast(Any, model.get_output_embeddings()).weight
        if head is not body.embed_tokens.weight:
            self.groups["head"] = [head]
        self.depth = len(body.layers)
        self._views: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._transposes: dict[str, Tensor] = {}
        self._adapters: dict[str, list[_Adapter]] | None = None
        self._lowest = 0  # the lowest layer with a gradient
        self._turns: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, longest: int, gradients: bool = False) -> Decoder | None:
        """Returns the passes for `model` on examples of up to `longest` tokens.

        None if they are not the model's: another architecture or setting, hooks, another dtype or
        device, longer examples; or if the model is large. Losses, and with `gradients` also these,
        are compared with the model's own once per configuration.
        """
        import torch

        if (
            not serves(model, longest)
            or any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters())
            or any(
                m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                or m._backward_pre_hooks or "forward" in m.__dict__
                for m in model.modules()
            )
        ):  # fmt: skip
            return None
        found = cls(model)
        if {id(p) for ps in found.groups.values() for p in ps} != set(map(id, model.parameters())):
            return None
        key = configuration_key(model), gradients
        if key not in _agrees:
            same = _same(model, gradients)
            if same is None:
                return None
            _agrees[key] = same
        return found if _agrees[key] else None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Stores the model's parameters in one vector, `weights`, within the context."""
        import torch

        size = sum(p.numel() for ps in self.groups.values() for p in ps)
        whole = torch.empty(size)
        grad = torch.zeros(size)
        done = 0
        for name, params in self.groups.items():
            if not params:
                continue
            first = done
            for p in params:
                part = whole[done : done + p.numel()].view_as(p)
                p.data = part.copy_(p.data)
                done += p.numel()
            shape = (-1, *params[0].shape[1:])
            self._views[name] = whole[first:done].view(shape)
            self._gradients[name] = grad[first:done].view(shape)
        self.weights = torch.nn.Parameter(whole)
        self.weights.grad = grad
        try:
            yield
        finally:
            for params in self.groups.values():
                for p in params:
                    p.data = p.data.clone()
            self._views, self._gradients, self._transposes = {}, {}, {}
            del self.weights

    @contextlib.contextmanager
    def adapting(self, lora: LoRA) -> Iterator[None]:
        """Computes gradients of the adapters of `lora`, which are merged, within the context."""
        import torch

        at = {id(m.weight): (a, b) for m, a, b in lora.layers}
        self._adapters, self._lowest = {}, max(lora.first, 0)
        for name, params in self.groups.items():
            if name.split(".")[0].isdigit() and int(name.split(".")[0]) < self._lowest:
                continue
            if len(params) > 1:
                whole = torch.cat([p.data for p in params])
                for p, part in zip(params, whole.split([len(p) for p in params])):
                    p.data = part
                self._views[name] = whole
            done, found = 0, []
            for p in params:
                if id(p) in at:
                    found.append(_Adapter(slice(done, done + len(p)), *at[id(p)], lora.scale))
                done += len(p)
            if found:
                self._adapters[name] = found
        if sum(map(len, self._adapters.values())) != len(lora.layers):
            raise AssertionError("an adapter's layer is not among the decoder's")
        for p in lora.parameters():
            p.grad = torch.zeros_like(p)
        try:
            yield
        finally:
            for name in self._views:
                for p in self.groups[name]:
                    p.data = p.data.clone()
            self._views, self._transposes, self._adapters, self._lowest = {}, {}, None, 0

    def clear(self) -> None:
        """Sets gradients to zero. Weights may have changed."""
        if self._adapters is None:
            self._transposes.clear()
            cast(Any, self.weights.grad).zero_()
            return
        for name, adapters in self._adapters.items():
            self._transposes.pop(name, None)
            for adapter in adapters:
                cast(Any, adapter.a.grad).zero_()
                cast(Any, adapter.b.grad).zero_()

    def gradients(self) -> dict[int, Tensor]:
        """Returns the gradient of each parameter by its id, as views, within `training`."""
        return {
            id(p): part.view_as(p)
            for name, params in self.groups.items()
            if params
            for p, part in zip(params, self._gradients[name].split([len(p) for p in params]))
        }

    # ------------------------------------------------------------------ passes

    def states(self, batch: Batch, first: int) -> list[Tensor]:
        """Computes the states that enter layer `first`: [d, length] of each example."""
        import torch

        b, t = batch.input_ids.shape
        with torch.no_grad():
            x = self._embedded(batch)
            for i in range(first):
                x = self._through(i, x, b, t, None)[0]
        lengths = batch.attention_mask.sum(1).tolist()
        return [x[:, i * t : i * t + n].clone() for i, n in enumerate(lengths)]

    def losses(self, batch: Batch, below: States | None = None) -> Tensor:
        """Computes each example's mean response-token loss: [b]. Padding is on the right.

        `below` are the states of the examples that `batch.index` counts, to begin with.
        """
        import torch

        with torch.no_grad():
            return batch.means(self._forward(batch, None, below)[0][: len(batch.places)])

    def gradient(self, batch: Batch, each: Tensor, below: States | None = None) -> Tensor:
        """Adds the gradient of losses [b] times `each` [b] to that of `weights`; returns losses."""
        import torch

        with torch.no_grad():
            kept: list[_Kept] = []
            values, last = self._forward(batch, kept, below)
            factors = values.new_zeros(len(values))
            factors[: len(batch.places)] = (each / batch.loss_mask.sum(1))[batch.rows]
            self._backward(batch, kept, last, factors)
            return batch.means(values[: len(batch.places)])

    def _of(self, name: str) -> Tensor:
        """Returns the joined weights of a group."""
        import torch

        if name in self._views:
            return self._views[name]
        params = self.groups[name]
        return params[0].data if len(params) == 1 else torch.cat([p.data for p in params])

    def _transposed(self, name: str) -> Tensor:
        """Returns the transpose of a group's weights, contiguous."""
        if name in self._transposes:
            return self._transposes[name]
        found = self._of(name).T.contiguous()
        if self._adapters is not None or self.weights.numel() <= _SMALL:
            self._transposes[name] = found
        return found

    def _layer(self, i: int) -> _Layer:
        return _Layer(*(self._of(f"{i}.{k}") if self.groups[f"{i}.{k}"] else None
                        for k in _Layer._fields))  # type: ignore[arg-type] # fmt: skip

    def _embedded(self, batch: Batch) -> Tensor:
        """Returns the embeddings of a batch [d, c], with zeros from b * t on."""
        import torch

        ids = batch.input_ids.flatten()
        x = torch.zeros(self.d, _up(len(ids), _COLUMNS))
        x[:, : len(ids)] = self._of("embed").index_select(0, ids).T
        return x

    def _entered(self, batch: Batch, below: States) -> Tensor:
        """Returns the states of a batch [d, c], with zeros where it has no token."""
        import torch

        b, t = batch.input_ids.shape
        x = torch.zeros(self.d, _up(b * t, _COLUMNS))
        for i, place in enumerate(batch.index):
            state = below.of[place]
            x[:, i * t : i * t + state.shape[1]] = state
        return x

    def _through(
        self, i: int, x: Tensor, b: int, t: int, places: Tensor | None
    ) -> tuple[Tensor, _Kept]:
        """Returns the states [d, c'] after layer `i` and what its backward pass reads.

        With `places` [c'], those of these tokens only.
        """
        import torch

        w = self._layer(i)
        scale_in, unit_in, seen = _normed(x, w.norm_in, self.eps)
        qkv = product(w.qkv, seen)
        if w.bias is not None:
            qkv += w.bias[:, None]
        q, k, v, p, mixed = self._attention(qkv, b, t)
        if places is not None:
            mixed, x = mixed[:, places], x[:, places]
        x = product(w.out, mixed).add_(x)
        scale_mid, unit_mid, read = _normed(x, w.norm_mid, self.eps)
        gate_up = product(w.gate_up, read)
        gate, up = gate_up[: self.f], gate_up[self.f :]
        opened = torch.nn.functional.silu(gate)
        hidden = opened * up
        x = product(w.down, hidden).add_(x)
        return x, _Kept(scale_in, unit_in, seen, q, k, v, p, mixed, scale_mid, unit_mid, read, gate,
                        up, opened, hidden)  # fmt: skip

    def _forward(
        self, batch: Batch, kept: list[_Kept] | None, below: States | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Computes losses of the response tokens, padded: [r]; and what the backward pass reads.

        That is the probability of each token [vocabulary, r], and scale [r], unit [d, r] and output
        [d, r] of the norm before the logits. Appends to `kept`.
        """
        import torch

        b, t = batch.input_ids.shape
        x = self._entered(batch, below) if below else self._embedded(batch)
        for i in range(below.first if below else 0, self.depth):
            # After attention, the last layer is read at the responses only.
            places = _padded(batch.places) if i == self.depth - 1 else None
            x, of_layer = self._through(i, x, b, t, places)
            if kept is not None:
                kept.append(of_layer)
        scale, unit, y = _normed(x, self._of("norm"), self.eps)
        logits = product(self._of("head" if "head" in self.groups else "embed"), y)
        logits -= logits.amax(0)
        r = len(batch.places)
        gold = logits[batch.gold, torch.arange(r)]
        logits.exp_()
        total = logits.sum(0)
        values = total.log()
        values[:r] -= gold
        if kept is not None:
            logits /= total
        return values, (logits, scale, unit, y)

    def _attention(self, qkv: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
        """Returns rotated q and k, v and attention as in `_Kept`, and the mix of values [n h, c].

        qkv is [(n + 2 m) h, c].
        """
        import torch

        n, m, h = self.n, self.m, self.h
        g, half, cols = n // m, h // 2, b * t
        cos, sin, mask = self._angles(t)
        q, k = torch.empty(m, b, h, g, t), torch.empty(m, b, h, t)
        asked, keys, values = self._heads(qkv, b, t)
        _turn(asked, q.view(m, b, 2, half, g, t).permute(0, 4, 2, 3, 1, 5), cos, sin)
        _turn(keys, k.view(m, b, 2, half, 1, t).permute(0, 4, 2, 3, 1, 5), cos, sin)
        v = values.transpose(1, 2).reshape(m * b, h, t)
        q, k = q.view(m * b, h, g * t), k.view(m * b, h, t)
        p = torch.baddbmm(mask, k.transpose(1, 2), q, alpha=h**-0.5)  # [m b, t, g t]
        p -= p.amax(1, keepdim=True)
        p.exp_()
        p /= p.sum(1, keepdim=True)
        mixed = torch.zeros(n * h, qkv.shape[1])
        mixed[:, :cols].view(m, g, h, b, t).copy_(
            torch.bmm(v, p).view(m, b, h, g, t).permute(0, 3, 2, 1, 4)
        )
        return q, k, v, p, mixed

    def _heads(self, qkv: Tensor, b: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views qkv [(n + 2 m) h, c] by head, rotated halves apart.

        Queries [m, n / m, 2, h / 2, b, t], keys [m, 1, 2, h / 2, b, t], values [m, h, b, t].
        """
        n, m, h = self.n * self.h, self.m * self.h, self.h
        q, k, v = qkv[:n, : b * t], qkv[n : n + m, : b * t], qkv[n + m :, : b * t]
        return (
            q.view(self.m, -1, 2, h // 2, b, t),
            k.view(self.m, 1, 2, h // 2, b, t),
            v.view(self.m, h, b, t),
        )

    def _attention_back(self, kept: _Kept, d_mixed: Tensor, b: int, t: int) -> Tensor:
        """Returns the gradient of qkv [(n + 2 m) h, c] from the gradient of the mix [n h, c]."""
        import torch

        n, m, h = self.n, self.m, self.h
        g, half = n // m, h // 2
        cos, sin, _ = self._angles(t)
        d_mix = d_mixed[:, : b * t].view(m, g, h, b, t).permute(0, 3, 2, 1, 4)
        d_mix = d_mix.reshape(m * b, h, g * t)
        d_v = torch.bmm(d_mix, kept.p.transpose(1, 2))  # [m b, h, t]
        d_p = torch.bmm(kept.v.transpose(1, 2), d_mix)  # [m b, t, g t]
        d_p -= (d_p * kept.p).sum(1, keepdim=True)
        d_p.mul_(kept.p).mul_(h**-0.5)
        d_q = torch.bmm(kept.k, d_p)  # [m b, h, g t]
        d_k = torch.bmm(kept.q, d_p.transpose(1, 2))  # [m b, h, t]
        d_qkv = torch.zeros((n + 2 * m) * h, d_mixed.shape[1])
        asked, keys, values = self._heads(d_qkv, b, t)
        _turn(d_q.view(m, b, 2, half, g, t).permute(0, 4, 2, 3, 1, 5), asked, cos, sin, -1)
        _turn(d_k.view(m, b, 2, half, 1, t).permute(0, 4, 2, 3, 1, 5), keys, cos, sin, -1)
        values.copy_(d_v.view(m, b, h, t).transpose(1, 2))
        return d_qkv

    def _backward(
        self, batch: Batch, kept: list[_Kept], last: tuple[Tensor, ...], factors: Tensor
    ) -> None:
        """Adds the gradient of the losses times `factors` [r]; see `_forward`. Uses up `last`."""
        import torch

        b, t = batch.input_ids.shape
        cols, r, at = b * t, len(batch.places), batch.places
        p, scale, unit, y = last
        p[batch.gold, torch.arange(r)] -= 1  # the gradient by logits
        p *= factors
        head = "head" if "head" in self.groups else "embed"
        self._add(head, p, y)
        d_y = product(self._transposed(head), p)
        d_x = torch.zeros_like(d_y)  # [d, r]
        self._norm_back("norm", d_y, scale, unit, d_x)
        for i in reversed(range(self._lowest, self.depth)):
            k = kept.pop()
            # x' = x + down (silu(gate) * up)
            d_hidden = product(self._transposed(f"{i}.down"), d_x)
            self._add(f"{i}.down", d_x, k.hidden)
            d_gate_up = torch.empty(2 * self.f, d_x.shape[1])
            torch.mul(d_hidden, k.opened, out=d_gate_up[self.f :])
            d_hidden *= k.up
            torch.ops.aten.silu_backward.grad_input(
                d_hidden, k.gate, grad_input=d_gate_up[: self.f]
            )
            self._add(f"{i}.gate_up", d_gate_up, k.read)
            d_read = product(self._transposed(f"{i}.gate_up"), d_gate_up)
            self._norm_back(f"{i}.norm_mid", d_read, k.scale_mid, k.unit_mid, d_x)
            # x = x'' + out (mix of values)
            self._add(f"{i}.out", d_x, k.mixed)
            d_mixed = product(self._transposed(f"{i}.out"), d_x)
            if i == self.depth - 1:  # back from the responses to all tokens
                d_mixed, d_x = (_spread(v[:, :r], at, k.seen.shape[1]) for v in (d_mixed, d_x))
            d_qkv = self._attention_back(k, d_mixed, b, t)
            self._add(f"{i}.qkv", d_qkv, k.seen)
            if f"{i}.bias" in self._gradients:
                self._gradients[f"{i}.bias"] += d_qkv.sum(1)
            if i == self._lowest and self._adapters is not None:
                return  # nothing below is trained
            d_seen = product(self._transposed(f"{i}.qkv"), d_qkv)
            self._norm_back(f"{i}.norm_in", d_seen, k.scale_in, k.unit_in, d_x)
        found, places = batch.input_ids.flatten().unique(return_inverse=True)
        rows = torch.ops.aten.embedding_dense_backward(
            d_x[:, :cols].T.contiguous(), places, len(found), -1, False
        )
        self._gradients["embed"][found] += rows

    def _add(self, name: str, d: Tensor, x: Tensor) -> None:
        """Adds d x.T [d_out, d_in] to the gradient of the weights W of a group in y = W x.

        With adapters, W = W' + scale B A: adds scale B.T d x.T to A's, scale d (A x).T to B's.
        """
        if self._adapters is None:
            self._gradients[name] += product(d, x.T)
            return
        for one in self._adapters.get(name, ()):
            part, a, b = d[one.rows], one.a.data, one.b.data
            cast(Any, one.a.grad).add_(product(product(b.T, part), x.T), alpha=one.scale)
            cast(Any, one.b.grad).add_(product(part, product(a, x).T), alpha=one.scale)

    def _norm_back(self, name: str, d_y: Tensor, scale: Tensor, unit: Tensor, d_x: Tensor) -> None:
        """Adds the gradients of a norm's weight, if trained, and input [d, c]. Uses up d_y."""
        if name in self._gradients:
            self._gradients[name] += (d_y * unit).sum(1)
        d_y *= self._of(name)[:, None]
        d_y.addcmul_(unit, (d_y * unit).mean(0), value=-1)
        d_x.addcmul_(d_y, scale)

    def _angles(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns cos and sin of the rotations [h / 2, 1, t] and the causal mask [t, (n / m) t]."""
        import torch

        if t not in self._turns:
            rotary: Any = self.model.model.rotary_emb
            cos, sin = rotary(torch.empty(0), torch.arange(t)[None])  # [1, t, h], halves equal
            half = self.h // 2
            mask = torch.full((t, t), -torch.inf).tril_(-1)  # later keys (rows)
            self._turns[t] = (
                cos[0, :, :half].T.contiguous()[:, None],
                sin[0, :, :half].T.contiguous()[:, None],
                mask.repeat(1, self.n // self.m),
            )
        return self._turns[t]


def cut(
    lengths: Sequence[int] | np.ndarray, most: int = 0, tokens: int = TOKENS
) -> list[np.ndarray]:
    """Splits examples into parts of similar length and at most `tokens`, padding included.

    Returns the positions in each part, of at most `most` examples (0: any number), such that the
    sum of the parts' estimated costs is least.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    n = len(order)
    least, first = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for j in range(1, n + 1):
        longest = int(lengths[order[j - 1]])
        size = max(1, min(j, tokens // longest, most or j))
        starts = np.arange(j - size, j)
        width = -(-(j - starts) * longest // _COLUMNS) * _COLUMNS
        cost = least[starts] + width + _EXTRA
        best = int(cost.argmin())
        least[j], first[j] = cost[best], starts[best]
    parts, j = [], n
    while j:
        parts.append(order[first[j] : j])
        j = int(first[j])
    return parts[::-1]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(places: Tensor) -> Tensor:
    """Repeats position 0 after `places` [tokens] up to a multiple: [r]."""
    out = places.new_zeros(_up(len(places), _COLUMNS))
    out[: len(places)] = places
    return out


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scale [c], x times scale [d, c], and that times the norm's weight [d, c]."""
    scale = x.square().mean(0).add_(eps).rsqrt_()
    unit = x * scale
    return scale, unit, unit * weight[:, None]


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> None:
    """Rotates the two halves of each head, x and out [., ., 2, h / 2, b, t]; back by sign -1."""
    import torch

    torch.mul(x, cos, out=out)
    out[:, :, 0].addcmul_(x[:, :, 1], sin, value=-sign)
    out[:, :, 1].addcmul_(x[:, :, 0], sin, value=sign)


def _spread(x: Tensor, places: Tensor, columns: int) -> Tensor:
    """Puts x [d, r] at `places` [r] of zeros [d, columns]."""
    out = x.new_zeros(len(x), columns)
    out[:, places] = x
    return out


def serves(model: PreTrainedModel, longest: int) -> bool:
    """Tells whether class, configuration, size and `longest` tokens are served, if in float32.

    The model may be without weights (on torch's device "meta").
    """
    size = sum(p.numel() for p in model.parameters())
    return longest <= LONGEST and size <= _LARGEST and _described(model)


def _described(model: PreTrainedModel) -> bool:
    """Tells whether class and configuration are among those that this module implements."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        type(model).__name__ in SERVED
        and type(model).__module__.startswith("transformers.models.")
        and config.hidden_act in ("silu", "swish")
        and rope.get("rope_type", "default") in _ROPES
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    )


def _same(model: PreTrainedModel, gradients: bool) -> bool | None:
    """Compares losses, and gradients, with the model's own on a few tokens, to 1e-4 of the largest.

    Norms and biases are perturbed meanwhile; see `forward.moved`. None where the model's own are
    not finite: a model that diverged says nothing about others of its configuration.
    """
    import torch

    from tdabench.targets.batches import Tokens, pad

    ids = probe_ids(model).numpy()
    tokens = [Tokens(row[: len(row) - 2 * i], 3 + i) for i, row in enumerate(ids)]
    batch = pad(tokens, np.arange(len(tokens)), int(ids[0, 0]))
    each = torch.tensor([1.0, 0.5, 0.25])
    params = list(model.parameters())
    wanted = [p.requires_grad for p in params]
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), moved(model):
            model.requires_grad_(gradients)
            losses = batch.means(
                torch.nn.functional.cross_entropy(
                    logits_at(model, batch.input_ids, batch.attention_mask, batch.places),
                    batch.gold, reduction="none",
                )
            )  # fmt: skip
            passes = Decoder(model)
            pairs = [(passes.losses(batch), losses.detach())]
            if gradients:
                theirs = torch.autograd.grad((losses * each).sum(), params)
                with passes.training():
                    pairs.append((passes.gradient(batch, each), losses.detach()))
                    ours = passes.gradients()
                pairs += [(ours[id(p)], g) for p, g in zip(params, theirs)]
            if not all(bool(b.isfinite().all()) for _, b in pairs):
                return None
            return all(
                float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) + 1e-7 for a, b in pairs
            )
    finally:
        for p, value in zip(params, wanted):
            p.requires_grad_(value)
