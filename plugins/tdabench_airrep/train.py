"""Trains an encoder: distillation from a teacher's scores, then ranking of retraining labels.

Every step embeds each of its distinct examples once without gradient, computes the loss and its
gradient with respect to the embeddings, and runs the encoder again chunk by chunk to propagate this
gradient to the weights (gradient caching: exact, two forwards, one backward, memory of one chunk).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdabench.api import (
    Corpus,
    DataError,
    TdabenchError,
    Tokens,
    UsageError,
    batch_places,
    fingerprint,
    named_seed,
    read_arrays,
    write_arrays,
)
from tdabench_airrep.encoder import Encoder, padded
from tdabench_airrep.labels import Instance, Labels
from tdabench_airrep.loss import group_scores, kernel_loss, ranking_loss
from tdabench_airrep.recipe import TrainConfig
from tdabench_airrep.teacher import Teacher

Say = Callable[[str], None]
STAGES = ("distil", "rank")
SLOPE = "slope"
CHUNK = 1024  # tokens per forward pass: on a CPU, activations that stay in cache are faster


# --------------------------------------------------------------------------- gradient caching


def embed(
    encoder: Encoder,
    tokens: Sequence[Tokens],
    chunk_tokens: int = CHUNK,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes embeddings without gradient, float32 [example, dim] on the CPU.

    `keep` [example, inputs of the projection] is the step's dropout.
    """
    out = torch.empty(len(tokens), encoder.dim)
    with torch.no_grad():
        for index in batch_places([len(t) for t in tokens], chunk_tokens):
            part = None if keep is None else keep[index]
            out[index] = encoder(*padded(tokens, index, encoder.device), part).float().cpu()
    return out


def cached_backward(
    encoder: Encoder,
    tokens: Sequence[Tokens],
    gradient: torch.Tensor,  # [example, dim]
    chunk_tokens: int = CHUNK,
    keep: torch.Tensor | None = None,
) -> None:
    """Adds d loss / d weights to the weights' `.grad`, given d loss / d embeddings.

    `keep` is the dropout under which `embed` computed the embeddings.
    """
    for index in batch_places([len(t) for t in tokens], chunk_tokens):
        index = index[np.asarray(gradient[index].abs().sum(1) > 0)]
        if len(index):
            part = None if keep is None else keep[index]
            out = encoder(*padded(tokens, index, encoder.device), part)
            out.backward(gradient[index].to(out.device, out.dtype))


@dataclass(frozen=True)
class Problem:
    """The data of one step: dev examples and training examples.

    `dev` and `train` are distinct positions in the corpora; `member` [subset, train] and `r`
    [dev, subset] are labels, `teacher` [dev, train] scores to distil; either may be None.
    """

    dev: np.ndarray
    train: np.ndarray
    member: torch.Tensor | None = None
    r: torch.Tensor | None = None
    teacher: torch.Tensor | None = None


def objective(
    q: torch.Tensor,
    z: torch.Tensor,
    problem: Problem,
    config: TrainConfig,
    slope: torch.Tensor | None = None,
    rows: int = 64,
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Computes the loss, and its gradients at the embeddings q [dev, d] and z [train, d].

    The loss ranks f times e^slope; its gradient is added to `slope.grad`.

    The ranking loss is averaged over the pairs with r_i > r_j, the distillation loss over dev
    examples that the teacher scored. Both are sums over dev examples, computed `rows` at a time, so
    that no [dev, train] matrix is held and memory does not grow with the number of dev examples.
    """
    dq, dz, value = torch.zeros_like(q), torch.zeros_like(z), 0.0
    pairs = 0
    if problem.r is not None:
        for a in range(0, len(q), rows):
            r = problem.r[a : a + rows]
            pairs += int((r[:, :, None] > r[:, None, :]).sum())
    weight = config.anchor if problem.r is not None else 1.0
    taught = 0 if problem.teacher is None else int(torch.isfinite(problem.teacher).any(1).sum())
    zr = z.detach().requires_grad_(True)
    for a in range(0, len(q), rows):
        qr = q[a : a + rows].detach().requires_grad_(True)
        s = qr @ zr.T  # [rows, train]
        loss = s.new_zeros(())
        if problem.r is not None and problem.member is not None:
            f = group_scores(s, problem.member, config.pooling, config.temperature)
            if slope is not None:
                f = f * slope.exp()
            total, _ = ranking_loss(f, problem.r[a : a + rows], config.low, config.high)
            loss = loss + total / max(1, pairs)
        if problem.teacher is not None and weight:
            t = problem.teacher[a : a + rows]
            keep = torch.isfinite(t)
            asked = keep.any(1)
            if bool(asked.any()):
                part = kernel_loss(s[asked], t.nan_to_num()[asked], keep[asked])
                loss = loss + weight * part / taught
        if not loss.requires_grad:
            continue
        wanted = [qr, zr] if slope is None or not slope.requires_grad else [qr, zr, slope]
        gq, gz, *gs = torch.autograd.grad(loss, wanted, allow_unused=True)
        if slope is not None and gs and gs[0] is not None:
            slope.grad = gs[0] if slope.grad is None else slope.grad + gs[0]
        value += float(loss.detach())
        dq[a : a + rows] = gq
        dz += gz
    return value, dq, dz


# --------------------------------------------------------------------------- the trainer


class Trainer:
    """Trains `encoder` in place; `seconds` is processor time.

    Every draw of a step depends only on the seed and the step's number, so that a resumed training
    gives the same result.
    """

    def __init__(
        self,
        encoder: Encoder,
        train: Corpus,
        dev: Corpus,
        config: TrainConfig,
        folder: Path,
        *,
        labels: Labels | None = None,
        teacher: Teacher | None = None,
        say: Say = lambda line: None,
        chunk_tokens: int = CHUNK,
    ) -> None:
        self.encoder, self.config, self.folder, self.say = encoder, config, folder, say
        self.chunk_tokens = chunk_tokens
        self.teacher = teacher
        if labels is not None:
            labels.check(train, dev)
            for line in labels.excluded():
                say(f"excluded: {line}")
        if teacher is not None:
            teacher.check(train, dev)
        instances = list(labels.instances) if labels is not None else []
        if config.steps and not instances:
            raise UsageError("ranking needs labels", "Pass --labels FILE, or --steps 0")
        if config.distil_steps and teacher is None:
            raise UsageError("distillation needs a teacher", "Pass --teacher FILE")
        if config.holdout >= len(instances) > 0:
            raise UsageError(
                f"{config.holdout} of {len(instances)} instances are held out, so none is left",
                "Hold out fewer, or make more labels",
            )
        cut = len(instances) - config.holdout
        self.instances: list[Instance] = instances[:cut]
        self.held: list[Instance] = instances[cut:]
        self.train, self.dev = encoder.tokenize(train), encoder.tokenize(dev)
        # Instances share their dev examples: held-out groups alone would not reveal an encoder that
        # has memorised its queries.
        self.probe = np.arange(0, len(dev), config.probe)
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] = {}
        self.best_lds = -np.inf
        self.seconds = 0.0
        encoder.body.requires_grad_(config.train_body)
        self.slope = torch.nn.Parameter(torch.zeros(())) if config.slope else None
        named = dict(self._parameters())
        body = [p for n, p in named.items() if n.startswith("body.")]
        scales = [named[n] for n in ("length", SLOPE) if n in named]
        head = [named[n] for n in named if n.startswith("projector.")]
        quick = config.head_factor * config.length_factor
        self.optimizer = torch.optim.AdamW(
            [
                {"params": body, "factor": 1.0},
                {"params": head, "factor": config.head_factor},
                {"params": scales, "factor": quick},
            ],
            lr=config.lr,
            weight_decay=config.weight_decay,
        )
        self._states: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------ embeddings

    def embed_dev(self, places: np.ndarray) -> torch.Tensor:
        return self._embed("dev", self.dev, places)

    def embed_train(self, places: np.ndarray) -> torch.Tensor:
        return self._embed("train", self.train, places)

    def _embed(self, name: str, tokens: Sequence[Tokens], places: np.ndarray) -> torch.Tensor:
        """Computes embeddings [place, dim] without gradient."""
        if self.config.train_body:
            return embed(self.encoder, [tokens[i] for i in places], self.chunk_tokens)
        with torch.no_grad():
            return self.encoder.project(self.states(name)[places]).float().cpu()

    def states(self, name: str) -> torch.Tensor:
        """Returns the span means [example, width] of "dev" or "train", which a frozen body
        computes once."""
        if name not in self._states:
            tokens = self.dev if name == "dev" else self.train
            out = torch.empty(len(tokens), sum(self.encoder.blocks), device=self.encoder.device)
            with torch.no_grad():
                for index in batch_places([len(t) for t in tokens], self.chunk_tokens):
                    out[index] = self.encoder.mean_states(
                        *padded(tokens, index, self.encoder.device)
                    )
            self._states[name] = out
        return self._states[name]

    # ------------------------------------------------------------------ problems

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng(named_seed(self.config.seed, name))

    def distil_problem(self, step: int) -> Problem:
        assert self.teacher is not None
        rng = self.rng(f"distil-{step}")
        rows, columns = np.setdiff1d(self.teacher.rows, self.probe), self.teacher.columns
        dev = rng.choice(rows, min(self.config.distil_queries, len(rows)), replace=False)
        train = rng.choice(columns, min(self.config.distil_train, len(columns)), replace=False)
        return self._with_teacher(Problem(dev, train))

    def rank_problem(self, step: int) -> Problem:
        c = self.config
        # Instances in a new order every round.
        n = len(self.instances)
        order = self.rng(f"instances-{step // n}").permutation(n)
        instance = self.instances[order[step % n]]
        rng = self.rng(f"rank-{step}")
        take = min(c.subsets or len(instance.subsets), len(instance.subsets))
        subsets = np.sort(rng.choice(len(instance.subsets), take, replace=False))
        usable = np.flatnonzero(~np.isin(instance.dev, self.probe))
        places = rng.choice(usable, min(c.dev, len(usable)), replace=False)
        chosen = instance.subsets.membership()[subsets]
        train = np.unique(chosen.indices).astype(np.int64)
        if 0 < c.pool < len(train):
            train = np.sort(rng.choice(train, c.pool, replace=False))
        member = chosen[:, train].toarray()
        problem = Problem(
            instance.dev[places],
            train,
            torch.from_numpy(member),
            torch.from_numpy(instance.labels[places][:, subsets]),
        )
        return self._with_teacher(problem) if c.anchor and self.teacher is not None else problem

    def _with_teacher(self, p: Problem) -> Problem:
        assert self.teacher is not None
        scores = self.teacher.scores[np.ix_(p.dev, p.train)].astype(np.float32)
        return Problem(p.dev, p.train, p.member, p.r, torch.from_numpy(scores))

    # ------------------------------------------------------------------ one step

    def lr_at(self, step: int) -> float:
        """Returns the learning rate: warm-up per stage, then linear decay or constant."""
        c = self.config
        if step < c.distil_steps:
            return c.distil_lr * min((step + 1) / max(1, c.warmup), 1 - step / c.distil_steps)
        return c.lr * min(1.0, (step - c.distil_steps + 1) / max(1, c.warmup))

    def kept(self, examples: int) -> torch.Tensor | None:
        """Draws the step's dropout [example, inputs of the projection]: 0 or 1 / (1 - dropout)."""
        p = self.config.dropout
        if not p:
            return None
        draw = torch.Generator().manual_seed(named_seed(self.config.seed, f"dropout-{self.step}"))
        some = torch.rand(examples, sum(self.encoder.blocks), generator=draw) >= p
        return some / (1 - p)

    def update(self, problem: Problem) -> float:
        n = len(problem.dev)
        keep = self.kept(n + len(problem.train))
        if self.config.train_body:
            tokens = [self.dev[i] for i in problem.dev] + [self.train[i] for i in problem.train]
            e = embed(self.encoder, tokens, self.chunk_tokens, keep)
        else:
            states = [self.states("dev")[problem.dev], self.states("train")[problem.train]]
            e = self.encoder.project(torch.cat(states), keep)
        found = e.detach().float().cpu()
        value, dq, dz = objective(found[:n], found[n:], problem, self.config, self.slope)
        if not np.isfinite(value):
            raise TdabenchError(f"the training loss became {value} at step {self.step}")
        gradient = torch.cat([dq, dz])
        if self.config.train_body:
            cached_backward(self.encoder, tokens, gradient, self.chunk_tokens, keep)
        else:
            e.backward(gradient.to(e.device, e.dtype))
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step) * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    # ------------------------------------------------------------------ before training

    def prepare(self) -> None:
        """Initialises the projection from the data: centred, whitened, and scaled to the loss."""
        if self.config.whiten and self.encoder.projector.weight.requires_grad:
            whiten_projection(self.encoder, self._sample(1000), self.rng("whiten"))
        self.calibrate()

    def _sample(self, n: int) -> list[Tokens]:
        chosen = self.rng("sample").choice(len(self.train), min(n, len(self.train)), replace=False)
        return [self.train[i] for i in chosen]

    def calibrate(self) -> None:
        """Scales the projection to minimise the ranking loss of one training instance.

        Distillation determines scores up to a factor, and a random projection does not at all.
        """
        if not self.instances:
            return
        problem = self.rank_problem(0)
        q = self.embed_dev(problem.dev)
        z = self.embed_train(problem.train)
        spread = float((q @ z.T).std()) or 1.0
        plain = Problem(problem.dev, problem.train, problem.member, problem.r)
        factors = [2.0**k / spread for k in range(-4, 8)]
        slopes = [0.0]
        if self.slope is not None:
            slopes = [k * math.log(2) for k in range(-3, 7)]
            few = None if problem.r is None else problem.r[:128]
            plain, q = Problem(problem.dev[:128], problem.train, problem.member, few), q[:128]
        losses = {
            (f, b): objective(q * f**0.5, z * f**0.5, plain, self.config, torch.tensor(b))[0]
            for f in factors
            for b in slopes
        }
        best, slope = min(losses, key=lambda k: losses[k])
        self.encoder.rescale(best**0.5)
        if self.slope is not None:
            self.slope.data.fill_(slope)
        self.say(f"scores scaled by {best:.3g}: ranking loss {min(losses.values()):.4f}")

    # ------------------------------------------------------------------ measuring

    def measure(self) -> dict[str, float]:
        """Measures held-out LDS, and agreement with the teacher on held-out queries."""
        out: dict[str, float] = {}
        if self.held:
            found = []
            for i in self.held:
                kept = np.isin(i.dev, self.probe)
                part = Instance(i.dev[kept], i.subsets, i.losses[:, kept])
                found.append(lds_of(self.scores_of(part), part.labels))
            out["lds"] = float(np.mean(found))
        if self.teacher is not None:
            dev, columns = np.intersect1d(self.probe, self.teacher.rows), self.teacher.columns
            train = self.rng("probe").choice(columns, min(1000, len(columns)), replace=False)
            q = self.embed_dev(dev)
            z = self.embed_train(train)
            t = torch.from_numpy(self.teacher.scores[np.ix_(dev, train)].astype(np.float32))
            out["kernel"] = 1 - float(kernel_loss(q @ z.T, t)) / max(1, len(q))
        return out

    def scores_of(self, instance: Instance) -> np.ndarray:
        """Computes group scores of an instance, float32 [dev, subset]."""
        q = self.embed_dev(instance.dev)
        pool = instance.pool
        z = self.embed_train(pool)
        member = torch.from_numpy(instance.subsets.membership()[:, pool].toarray())
        c = self.config
        with torch.no_grad():
            return group_scores(q @ z.T, member, c.pooling, c.temperature).numpy()

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Trains to the end, or until the held-out LDS stops rising; keeps the best weights."""
        c = self.config
        total = c.distil_steps + c.steps
        began = time.process_time()
        if not self.resume():
            self.prepare()  # a frozen body computes all its states here: most of a short training
            self.seconds += time.process_time() - began
            self._note("start", 0.0, total)
        began, losses = time.process_time(), []
        while self.step < total and not self._over():
            stage = STAGES[self.step >= c.distil_steps]
            if stage == "rank" and self.step == c.distil_steps and c.distil_steps:
                self.calibrate()
                self._reset_moments()
            if stage == "distil":
                problem = self.distil_problem(self.step)
            else:
                problem = self.rank_problem(self.step - c.distil_steps)
            losses.append(self.update(problem))
            self.step += 1
            if self.step % c.every == 0 or self.step in (c.distil_steps, total):
                self.seconds += time.process_time() - began
                self._note(stage, float(np.mean(losses)), total)
                self.save()
                began, losses = time.process_time(), []
        if self.best:
            self.encoder.load_state_dict(self.best)
        self.encoder.fold()

    def _note(self, stage: str, loss: float, total: int) -> None:
        began = time.process_time()
        found = self.measure()
        score = found.get("lds", found.get("kernel", -loss))
        # An encoder that is only whitened is a baseline of the curve, not a candidate.
        if stage != "start" and score > self.best_lds:
            self.best_lds = score
            self.best = {k: v.detach().clone() for k, v in self.encoder.state_dict().items()}
        self.seconds += time.process_time() - began
        row = {"step": self.step, "stage": stage, "loss": round(loss, 5)}
        row |= {k: round(v, 5) for k, v in found.items()}
        self.curve.append({**row, "seconds": round(self.seconds, 1)})
        told = {**({} if stage == "start" else {"loss": loss}), **found}
        shown = "".join(f"{k} {v:.4f}, " for k, v in told.items())
        self.say(f"{stage} step {self.step}/{total}: {shown}{self.seconds:.0f} s")

    def _over(self) -> bool:
        """Tells whether the last `patience` measurements of the ranking stage did not improve."""
        scores = [r.get("lds") for r in self.curve if r["stage"] == "rank"]
        if len(scores) <= self.config.patience or scores[0] is None:
            return False
        past = [r["lds"] for r in self.curve if r["stage"] != "start" and "lds" in r]
        recent = past[-self.config.patience :]
        return max(recent) <= max(past[: -self.config.patience])

    def _reset_moments(self) -> None:
        self.optimizer.state.clear()

    # ------------------------------------------------------------------ checkpoints

    def key(self) -> str:
        """Returns the key of a checkpoint, which does not include the length of training."""
        recipe = {k: v for k, v in asdict(self.config).items() if k not in ("steps", "patience")}
        sizes = [[len(i.dev), len(i.subsets)] for i in self.instances]
        shape = {n: list(p.shape) for n, p in self.encoder.named_parameters()}
        teacher = dict(self.teacher.meta) if self.teacher else None
        return fingerprint([recipe, sizes, shape, teacher, self.encoder.config()["airrep_text"]])

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        arrays = {f"w.{k}": v.detach().cpu().numpy() for k, v in self.encoder.state_dict().items()}
        arrays |= {f"best.{k}": v.cpu().numpy() for k, v in self.best.items()}
        steps: list[float] = []
        for name, p in self._parameters():
            state = self.optimizer.state.get(p)
            if state:
                arrays[f"m.{name}"] = state["exp_avg"].cpu().numpy()
                arrays[f"v.{name}"] = state["exp_avg_sq"].cpu().numpy()
                steps.append(float(state["step"]))
        meta = {
            "kind": "airrep-checkpoint",
            "key": self.key(),
            "step": self.step,
            "curve": self.curve,
            "seconds": self.seconds,
            "best_lds": self.best_lds,
            "moments": steps[0] if steps else 0.0,
            "slope": None if self.slope is None else self.slope.item(),
        }
        write_arrays(self.checkpoint, arrays, meta)

    def resume(self) -> bool:
        """Resumes from the checkpoint in the folder, if there is one for this training."""
        if not self.checkpoint.exists():
            return False
        arrays, meta = read_arrays(self.checkpoint)
        if meta.get("kind") != "airrep-checkpoint" or meta.get("key") != self.key():
            raise DataError(
                f"{self.checkpoint} belongs to another training",
                "Choose another folder, or delete it to start again",
            )

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {
                k.removeprefix(prefix): torch.from_numpy(v)
                for k, v in arrays.items()
                if k.startswith(prefix)
            }

        weights = part("w.")
        if "centre" in weights:
            roots = [weights[f"root{i}"] for i in range(len(self.encoder.blocks))]
            self.encoder.read_through(weights["centre"], roots)
        self.encoder.load_state_dict(weights)
        self.best = part("best.")
        m, v = part("m."), part("v.")
        for name, p in self._parameters():
            if name in m:
                self.optimizer.state[p] = {
                    "step": torch.tensor(meta["moments"]),
                    # A file has no scalars: the learned length is read with one entry.
                    "exp_avg": m[name].reshape(p.shape).clone(),
                    "exp_avg_sq": v[name].reshape(p.shape).clone(),
                }
        self.step, self.curve = meta["step"], list(meta["curve"])
        self.seconds, self.best_lds = meta["seconds"], meta["best_lds"]
        if self.slope is not None:
            self.slope.data.fill_(meta["slope"])
        self.say(f"resumed at step {self.step}")
        return True

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        slope = [] if self.slope is None else [(SLOPE, self.slope)]
        return [*self.encoder.named_parameters(), *slope]


def whiten_projection(
    encoder: Encoder, tokens: Sequence[Tokens], rng: np.random.Generator, damping: float = 0.1
) -> None:
    """Lets the projection read each span's mean centred and whitened, and makes it a rotation.

    Means of language models' states have a large common mean and a few large directions, which
    would dominate a dot product. Each span is whitened separately, with eigenvalues damped by
    `damping` times their mean, and scaled to the same mean square, so that variances are 1 on
    average. The rotation is drawn at random; if there are fewer dimensions than states, it maps
    onto their principal directions.
    """
    found = []
    with torch.no_grad():
        for index in batch_places([len(t) for t in tokens], 4096):
            found.append(encoder.mean_states(*padded(tokens, index, encoder.device)).cpu())
    states = torch.cat(found).double().numpy()  # [example, width]
    mean = states.mean(0)
    roots, white = [], []
    for h in np.split(states - mean, np.cumsum(encoder.blocks)[:-1], axis=1):
        values, vectors = np.linalg.eigh(h.T @ h / len(h))
        values = values.clip(0)
        scale = 1 / np.sqrt(values + damping * max(values.mean(), 1e-20))
        root = vectors * scale @ vectors.T
        size = ((h @ root) ** 2).sum(1).mean() * len(encoder.blocks) / states.shape[1]
        root /= np.sqrt(max(size, 1e-20))
        roots.append(root)
        white.append(h @ root)
    dim, width = encoder.dim, len(mean)
    if dim >= width:
        rotation, _ = np.linalg.qr(rng.standard_normal((dim, width)))  # orthonormal columns
    else:
        h = np.concatenate(white, axis=1)
        rotation = np.linalg.eigh(h.T @ h)[1][:, ::-1][:, :dim].T
    weight, bias = encoder.projector.weight, encoder.projector.bias

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(weight)

    with torch.no_grad():
        weight.copy_(tensor(rotation))
        bias.zero_()
    encoder.read_through(tensor(mean), [tensor(r) for r in roots])


def lds_of(f: np.ndarray, r: np.ndarray) -> float:
    """Averages Spearman(f, r) over subsets over dev examples; f and r [dev, subset].

    NaN labels are left out; a dev example with fewer than three labels is not counted.
    """
    from tdabench.api import spearman_rows

    finite = np.isfinite(r)
    whole = finite.all(1)
    values = list(spearman_rows(f[whole], r[whole])) if whole.any() else []
    for i in np.flatnonzero(~whole):
        if finite[i].sum() >= 3:
            values += list(spearman_rows(f[i : i + 1, finite[i]], r[i : i + 1, finite[i]]))
    return float(np.mean(values)) if values else 0.0
