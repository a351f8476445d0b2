"""Daunce: covariance of losses over models tuned on a randomly perturbed objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tdabench.api import (
    Context,
    Example,
    UsageError,
    check_room,
    pad,
    random_groups,
)
from tdabench_influence.covariance import CovarianceMethod


@dataclass(frozen=True, kw_only=True)
class Daunce(CovarianceMethod):
    """score(q, z) = Cov_k( loss_q(theta_k), loss_z(theta_k) ) over perturbed models theta_k.

    Each model is tuned from the checkpoint's weights theta_0 on a random part D_k of the corpus, on
    the objective (arXiv 2505.23223)

        mean_(i in D_k) [ L_i(theta) - L_i(theta_0) - 2 xi_i grad L_i(theta_0)^T (theta - theta_0) ]

    with xi_i uniform in [0, 1], drawn per model and example. At theta_0 its gradient is the mean
    of (1 - 2 xi_i) g_i: random, and 0 on average, so that the models scatter around theta_0 as
    H^-1 times a sample of the gradients' covariance, and where the Fisher equals H, the covariance
    is an influence function, without a Hessian. The gradient at theta_0 is taken on every batch.

    models      number of perturbed models, counted as retrainings; the covariance has this rank
    share       share of the corpus in each D_k
    steps       steps of SGD per model
    lr          step size
    batch       examples per step

    pooling       how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature   of softmax pooling; unused by sum and mean
    checkpoint    checkpoint of the target around which models are tuned
    """

    name = "daunce"
    family = "influence"
    source = "Pan et al. 2025 (Daunce), arXiv 2505.23223"
    summary = "covariance of losses over models tuned on a perturbed objective"
    grid = {"lr": (0.03, 0.3), "checkpoint": ("base", "warm")}
    expected_failures = {
        "a-copy-outranks-others": "all losses move together, and few models are noisy"
    }
    remedy = "Lower lr"
    check_settings = {"models": 6, "steps": 3, "batch": 8}

    models: int = 40
    share: float = 0.5
    steps: int = 16
    lr: float = 0.1
    batch: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.models < 2:
            raise UsageError(f"{self.name}: a covariance needs at least 2 models")
        if not 0 < self.share <= 1:
            raise UsageError(f"{self.name}: share must be in (0, 1], not {self.share}")
        if self.steps < 1 or self.batch < 1 or not self.lr > 0:
            raise UsageError(f"{self.name}: steps and batch must be at least 1, and lr positive")

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        return {"retrainings": float(self.models)}  # their time is in the build

    def models_near(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        """Returns the weights of the perturbed models, float32 [model, parameter].

        They are close together: float16 would round their differences away.
        """
        import torch

        from tdabench.api import example_losses

        target = context.target
        start = target.fresh_model(self.checkpoint).to(context.device).requires_grad_(True)  # type: ignore[arg-type]
        model = target.fresh_model(self.checkpoint).to(context.device).requires_grad_(True)  # type: ignore[arg-type]
        params, first = list(model.parameters()), list(start.parameters())
        check_room(2 * self.models, sum(p.numel() for p in params))  # it counts float16
        tokens = target.tokenize(train)
        groups = random_groups(context, train, self.models, self.share, "daunce/groups")
        ids = np.array([e.id for e in train])
        out = []
        for k in range(self.models):
            with torch.no_grad():
                for p, p0 in zip(params, first):
                    p.copy_(p0)
            rng = context.rng(f"daunce/{k}")
            members = groups[k] if len(train) else np.zeros(0, dtype=np.int64)
            members = members[np.argsort(ids[members], kind="stable")]
            weight = 2 * rng.random(len(members))  # 2 xi
            order = np.zeros(0, dtype=np.int64)
            for _ in range(self.steps if len(members) else 0):
                if len(order) < min(self.batch, len(members)):
                    order = rng.permutation(len(members))  # a new epoch
                chosen, order = order[: self.batch], order[self.batch :]
                inputs = pad(tokens, members[chosen], target.pad_id).to(context.device)
                xi = torch.from_numpy(weight[chosen]).to(context.device, torch.float32)
                with torch.enable_grad():
                    here = torch.autograd.grad(
                        example_losses(model, inputs).mean(), params, allow_unused=True
                    )
                    there = torch.autograd.grad(
                        (xi * example_losses(start, inputs)).mean(), first, allow_unused=True
                    )
                with torch.no_grad():
                    for p, g, g0 in zip(params, here, there):
                        if g is not None:
                            p.sub_(self.lr * (g - g0))
            out.append(np.concatenate([p.detach().float().flatten().cpu() for p in params]))
            context.progress("perturbed models", k + 1, self.models)
        return np.stack(out)
