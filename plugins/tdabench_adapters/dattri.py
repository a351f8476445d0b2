"""dattri: its TracIn and its TRAK, on the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Index,
    MethodError,
    UsageError,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from tdabench_adapters.common import (
    PackageMethod,
    causal_mask,
    contained,
    longest_first,
    package,
    padded,
)

if TYPE_CHECKING:
    import torch

REMEDY = "Install it with: pip install 'tdabench[dattri]'"
_EXAMPLES_A_BATCH = 32  # dattri holds whole gradients of a batch


@dataclass(frozen=True, kw_only=True)
class DattriMethod(PackageMethod):
    """An attributor of dattri, which has no index and reads the whole corpus per query batch.

    Attributes to the weights of the selected layers, without biases.
    """

    def build(self, context: Context, train: Sequence[Example]) -> DattriIndex:
        package("dattri.algorithm", "dattri", REMEDY)
        self.check(len(train))
        return DattriIndex(self, context, list(train))

    def load(self, context: Context, path: Path) -> DattriIndex:
        meta = read_json(path / "index.json")
        self.check_saved(path, meta)
        package("dattri.algorithm", "dattri", REMEDY)
        return DattriIndex(self, context, list(read_jsonl(path / "train.jsonl")))

    def check(self, n_train: int) -> None:
        """Raises if the settings do not fit the number of examples."""

    def attribute(self, task: Any, names: list[str], index: DattriIndex, loaders: Any) -> Any:
        """Computes dattri's scores [train, query]; `loaders` are (train, query)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DattriTracIn(DattriMethod):
    """dattri's TracInAttributor at one checkpoint: g_q . g_z of whole gradients (`identity`)."""

    name = "dattri-tracin"
    source = "Pruthi et al. 2020, arXiv 2002.08484; package dattri 0.3"
    summary = "TracIn at one checkpoint by the package dattri (extra)"

    def attribute(self, task: Any, names: list[str], index: DattriIndex, loaders: Any) -> Any:
        import torch
        from dattri.algorithm import TracInAttributor

        attributor = TracInAttributor(
            task=task,
            weight_list=torch.ones(1),
            normalized_grad=False,
            layer_name=names,
            device=index.context.device,
        )
        attributor.projector_kwargs = None  # its own default projects to 512
        return attributor.attribute(*loaders)


@dataclass(frozen=True, kw_only=True)
class DattriTRAK(DattriMethod):
    """dattri's TRAKAttributor: sketched gradients of the log-odds, with a ridge.

    Like `trak` with a dense sketch. The whole corpus is sketched again for every call.

    proj_dim        sketch dimension
    regularization  dattri's lambda, added to Phi^T Phi unscaled
    """

    name = "dattri-trak"
    source = "Park et al. 2023, arXiv 2303.14186; package dattri 0.3"
    summary = "TRAK by the package dattri (extra)"

    proj_dim: int = 512
    regularization: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proj_dim < 1 or self.regularization < 0:
            raise UsageError(f"{self.name}: proj_dim must be >= 1 and regularization >= 0")

    def check(self, n_train: int) -> None:
        if self.regularization == 0 and n_train <= self.proj_dim:
            raise MethodError(
                f"{self.name}: {n_train} examples in {self.proj_dim} dimensions need a ridge",
                "Set regularization above 0, or lower proj_dim",
            )

    def attribute(self, task: Any, names: list[str], index: DattriIndex, loaders: Any) -> Any:
        from dattri.algorithm import TRAKAttributor

        train, queries = loaders
        attributor = TRAKAttributor(
            task=task,
            correct_probability_func=lambda weights, data: index.probability(weights, data),
            # Set every key in a new dict: dattri shares one default between all instances.
            projector_kwargs={
                "proj_dim": self.proj_dim,
                "proj_max_batch_size": 32,
                "proj_seed": index.context.seed,
                "device": index.context.device,
            },
            layer_name=names,
            device=index.context.device,
            regularization=self.regularization,
        )
        attributor.cache(train)
        return attributor.attribute(queries)


class DattriIndex(Index):
    """The training examples; dattri does the rest when scoring."""

    def __init__(self, method: DattriMethod, context: Context, train: list[Example]) -> None:
        self.method, self.context, self.train = method, context, train
        self.n_train = len(train)
        self.pooling, self.temperature = method.pooling, method.temperature

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        if not len(queries):
            return np.empty((0, self.n_train), dtype=np.float32)
        from dattri.task import AttributionTask

        self.model = self.context.target.fresh_model(self.method.checkpoint)
        self.model = self.model.to(self.context.device).requires_grad_(True)  # type: ignore[arg-type]
        self.model.set_attn_implementation("eager")  # fused attention has no rule under vmap
        names = [f"{name}.weight" for name in self.method.layer_names(self.model)]
        train_rows, train_places = self._loader(self.train)
        query_rows, query_places = self._loader(queries)
        with contained():
            task = AttributionTask(
                loss_func=self._output,
                model=self.model,
                checkpoints=self.model.state_dict(),
            )
            found = self.method.attribute(task, names, self, (train_rows, query_rows))
        out = np.empty((len(queries), self.n_train), dtype=np.float32)
        out[np.ix_(query_places, train_places)] = found.detach().float().cpu().numpy().T
        return out

    def _loader(self, examples: Sequence[Example]) -> tuple[Any, np.ndarray]:
        """Returns a DataLoader of (ids, attention mask, loss mask) and its rows' positions."""
        from torch.utils.data import DataLoader

        tokens = self.context.target.tokenize(examples)
        places = longest_first(tokens)

        def collated(rows: Any) -> tuple[torch.Tensor, ...]:
            batch = padded(self.context, rows)
            return batch.input_ids, causal_mask(batch), batch.loss_mask

        rows = [tokens[int(i)] for i in places]
        return DataLoader(rows, batch_size=_EXAMPLES_A_BATCH, collate_fn=collated), places  # type: ignore[arg-type]

    def _losses(self, weights: Any, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (-log p of each position [t - 1], loss mask [t - 1]) of one example."""
        import torch

        ids, attention, mask = data
        kwargs = {"input_ids": ids[None], "attention_mask": attention[None]}
        out = torch.func.functional_call(self.model, weights, (), kwargs)
        logits = out.logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"), mask

    def _output(self, weights: Any, data: Any) -> torch.Tensor:
        """Returns the function to differentiate: the mean loss, or for TRAK the mean log-odds."""
        import torch

        losses, mask = self._losses(weights, data)
        if isinstance(self.method, DattriTRAK):
            rest = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
            losses = -losses - rest.log()
        # Outside the response the odds may be infinite: mask them before multiplying.
        return torch.where(mask, losses, 0.0).sum() / mask.sum()

    def probability(self, weights: Any, data: Any) -> torch.Tensor:
        """Computes the mean p of the response's tokens."""
        losses, mask = self._losses(weights, data)
        return ((-losses).exp() * mask).sum() / mask.sum()

    def save(self, path: Path) -> None:
        write_jsonl(path / "train.jsonl", self.train)
        write_json(
            path / "index.json", {"method": self.method.name, "version": self.method.version}
        )
