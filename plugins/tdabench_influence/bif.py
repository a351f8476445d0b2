"""BIF: covariance of losses under a posterior around the trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tdabench.api import (
    Context,
    Example,
    UsageError,
    check_room,
    pad,
    weights_of,
)
from tdabench_influence.covariance import CovarianceMethod


@dataclass(frozen=True, kw_only=True)
class BIF(CovarianceMethod):
    """score(q, z) = Cov(loss_q(theta), loss_z(theta)) over samples theta near the checkpoint.

    The local Bayesian influence function (arXiv 2509.26544): theta is drawn from the posterior

        p(theta) ~ exp(-beta mean_i loss_i(theta) - localisation |theta - theta_0|^2 / 2)

    by stochastic-gradient Langevin dynamics from the checkpoint's weights theta_0. Raising the
    weight of z lowers the expected loss of q in proportion to Cov(loss_q, loss_z): an example whose
    loss rises and falls with the query's is helpful. In the Gaussian limit the covariance is
    g_q^T (beta H + localisation I)^-1 g_z, but no Hessian is formed or inverted. A step is

        theta <- theta - step/2 (beta grad mean-loss of a batch + localisation (theta - theta_0))
                 + sqrt(step) noise.

    Covariances are within chains. The samples' weights are kept (float16); a query costs one
    forward pass per sample. For small models: all weights move at once, so that the covariance of
    few samples is noise.

    beta          inverse temperature of the mean training loss (the paper's n beta)
    localisation  strength of the Gaussian around theta_0: its standard deviation per weight is at
                  most localisation^-1/2, which should be small against the weights
    step          step size; step * localisation well below 1
    chains        independent chains
    draws         samples per chain
    every         steps between two samples
    burn_in       steps before a chain's first sample
    batch         examples per step

    pooling       how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature   of softmax pooling; unused by sum and mean
    checkpoint    checkpoint of the target around which weights are drawn
    """

    name = "bif"
    family = "influence"
    source = "Kreer et al. 2025, arXiv 2509.26544"
    summary = "Bayesian influence: covariance of losses over weights sampled near the checkpoint"
    grid = {"localisation": (1e4, 1e5), "checkpoint": ("base", "warm")}
    expected_failures = {
        "a-copy-outranks-others": "all losses move together, and few samples are noisy"
    }
    remedy = "Lower step, or raise localisation"
    check_settings = {"draws": 6, "chains": 2, "every": 2, "burn_in": 8}

    beta: float = 1e4
    localisation: float = 1e5
    step: float = 2e-6
    draws: int = 20
    chains: int = 4
    every: int = 5
    burn_in: int = 20
    batch: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"draws": 1, "chains": 1, "every": 1, "burn_in": 0, "batch": 1}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise UsageError(f"{self.name}: {key} must be at least {value}")
        if self.draws * self.chains < 2:
            raise UsageError(f"{self.name}: a covariance needs at least 2 samples")
        if not self.step > 0 or self.localisation < 0 or self.beta < 0:
            raise UsageError(f"{self.name}: step > 0, localisation and beta >= 0")

    @property
    def n_chains(self) -> int:
        return self.chains

    def models_near(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        """Returns the weights of the samples, float16 [chain * draw, parameter]."""
        import torch

        from tdabench.api import example_losses

        target = context.target
        model = target.fresh_model(self.checkpoint).to(context.device).requires_grad_(True)  # type: ignore[arg-type]
        params = list(model.parameters())
        start = [p.detach().clone() for p in params]
        check_room(self.draws * self.chains, sum(p.numel() for p in params))
        tokens = target.tokenize(train)
        by_id = np.argsort([e.id for e in train], kind="stable")
        steps = self.burn_in + (self.draws - 1) * self.every
        out = []
        for chain in range(self.chains):
            with torch.no_grad():
                for p, p0 in zip(params, start):
                    p.copy_(p0)
            rng, noise = context.rng(f"bif/{chain}"), context.torch_generator(f"bif/{chain}")
            for step in range(steps + 1):
                if step >= self.burn_in and (step - self.burn_in) % self.every == 0:
                    out.append(weights_of(model))
                if step == steps:
                    break
                grads = [torch.zeros_like(p) for p in params]
                if len(train) and self.beta:
                    chosen = by_id[
                        rng.choice(len(train), min(self.batch, len(train)), replace=False)
                    ]
                    inputs = pad(tokens, chosen, target.pad_id).to(context.device)
                    with torch.enable_grad():
                        loss = example_losses(model, inputs).mean()
                        found = torch.autograd.grad(loss, params, allow_unused=True)
                    grads = [g if f is None else self.beta * f for f, g in zip(found, grads)]
                with torch.no_grad():
                    for p, p0, g in zip(params, start, grads):
                        drift = g + self.localisation * (p - p0)
                        z = torch.randn(p.shape, generator=noise).to(p)
                        p.add_(-self.step / 2 * drift + self.step**0.5 * z)
            context.progress("chains", chain + 1, self.chains)
        return np.stack(out)
