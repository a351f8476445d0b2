"""kronfluence: EK-FAC and its relatives by their authors' package."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Index,
    UsageError,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from tdabench_adapters.common import (
    PackageMethod,
    contained,
    longest_first,
    package,
    padded,
)

if TYPE_CHECKING:
    import torch

REMEDY = (
    "Install it with: pip install --no-deps kronfluence einconv accelerate einops opt-einsum "
    "(it declares torchvision, which it does not import)"
)


@dataclass(frozen=True, kw_only=True)
class KronfluenceEKFAC(PackageMethod):
    """The package kronfluence on the target: its factors, eigendecompositions and scores.

    The same quantity as `ekfac`, with biases and the same drawn labels.

    strategy  "ekfac", "kfac", "diagonal" or "identity"
    fisher    "true" (labels drawn from the model) or "empirical"
    damping   kronfluence's, added unscaled to every eigenvalue; None is 0.1 times their mean
    """

    name = "kronfluence-ekfac"
    source = "Grosse et al. 2023, arXiv 2308.03296; package kronfluence 1.0"
    summary = "EK-FAC influence by the package kronfluence (extra)"

    strategy: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac"
    fisher: Literal["true", "empirical"] = "true"
    damping: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping is not None and self.damping < 0:
            raise UsageError(f"{self.name}: damping must not be negative, but is {self.damping}")

    def build(self, context: Context, train: Sequence[Example]) -> KronfluenceIndex:
        package("kronfluence", "kronfluence", REMEDY)
        folder = context.scratch / "kronfluence"
        shutil.rmtree(folder, ignore_errors=True)
        analyzer = self.analyzer(context, folder)
        from kronfluence.arguments import FactorArguments

        rows, _ = self.rows(context, train)
        with contained():
            analyzer.fit_all_factors(
                "factors",
                rows,
                per_device_batch_size=32,
                factor_args=FactorArguments(
                    strategy=self.strategy, use_empirical_fisher=self.fisher == "empirical"
                ),
                overwrite_output_dir=True,
            )
        return KronfluenceIndex(self, context, list(train), folder)

    def analyzer(self, context: Context, folder: Path) -> Any:
        """Returns a kronfluence Analyzer on its own model, writing under `folder`."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.utils.dataset import DataLoaderKwargs

        model = context.target.fresh_model(self.checkpoint)
        task = _task(self.layer_names(model))
        with contained():
            analyzer = Analyzer(
                "tdabench",
                prepare_model(model, task),
                task,
                cpu=context.device == "cpu",
                output_dir=str(folder),
                disable_tqdm=True,
                log_level=logging.CRITICAL,
            )
        kwargs = DataLoaderKwargs(num_workers=0, collate_fn=lambda rows: _collated(context, rows))
        analyzer.set_dataloader_kwargs(kwargs)
        return analyzer

    def rows(self, context: Context, examples: Sequence[Example]) -> tuple[list, np.ndarray]:
        """Returns (tokens, one uniform number per response token) by length, and the positions."""
        tokens = context.target.tokenize(examples)
        places = longest_first(tokens)
        # By id, as in `ekfac`: a label does not depend on batch or position.
        drawn = [
            context.rng(f"fisher/{e.id}").random(len(t) - t.start) for e, t in zip(examples, tokens)
        ]
        return [(tokens[int(i)], drawn[int(i)]) for i in places], places

    def load(self, context: Context, path: Path) -> KronfluenceIndex:
        meta = read_json(path / "index.json")
        self.check_saved(path, meta)
        package("kronfluence", "kronfluence", REMEDY)
        folder = context.scratch / "kronfluence-loaded"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(path / "kronfluence", folder)
        return KronfluenceIndex(self, context, list(read_jsonl(path / "train.jsonl")), folder)


class KronfluenceIndex(Index):
    """kronfluence's folder of factors, and the training examples, which it reads again."""

    def __init__(
        self, method: KronfluenceEKFAC, context: Context, train: list[Example], folder: Path
    ) -> None:
        self.method, self.context, self.train, self.folder = method, context, train, folder
        self.n_train = len(train)
        self.pooling, self.temperature = method.pooling, method.temperature

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        if not len(queries):
            return np.empty((0, self.n_train), dtype=np.float32)
        from kronfluence.arguments import ScoreArguments

        query_rows, query_places = self.method.rows(self.context, queries)
        train_rows, train_places = self.method.rows(self.context, self.train)
        analyzer = self.method.analyzer(self.context, self.folder)
        with contained():
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query_rows,
                train_rows,
                per_device_query_batch_size=32,
                per_device_train_batch_size=64,
                score_args=ScoreArguments(damping_factor=self.method.damping),
                overwrite_output_dir=True,
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"]
        for file in self.folder.rglob("scores_scores"):  # of this call and no longer needed
            shutil.rmtree(file)
        out = np.empty((len(queries), self.n_train), dtype=np.float32)
        out[np.ix_(query_places, train_places)] = found.float().numpy()
        return out

    def save(self, path: Path) -> None:
        ignore = shutil.ignore_patterns("scores_*")
        shutil.copytree(self.folder, path / "kronfluence", ignore=ignore)
        write_jsonl(path / "train.jsonl", self.train)
        write_json(
            path / "index.json", {"method": self.method.name, "version": self.method.version}
        )


def _collated(context: Context, rows: Sequence[tuple]) -> tuple[torch.Tensor, ...]:
    """Returns (ids, attention mask, loss mask [b, t - 1], uniform numbers [b, t - 1])."""
    import torch

    batch = padded(context, [tokens for tokens, _ in rows])
    uniform = torch.zeros(batch.loss_mask.shape, dtype=torch.float64)
    uniform[batch.loss_mask] = torch.from_numpy(np.concatenate([u for _, u in rows]))
    return batch.input_ids, batch.attention_mask, batch.loss_mask, uniform


def _task(names: list[str]) -> Any:
    import torch
    from kronfluence.task import Task

    from tdabench.api import Batch, example_losses, response_logits

    class ResponseLoss(Task):
        """The mean response-token loss, summed over examples, for the layers `names`."""

        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            of = Batch(np.arange(len(batch[0])), *batch[:3])
            if not sample:
                return example_losses(model, of).sum()
            logits = response_logits(model, of).float()
            with torch.no_grad():
                below = torch.softmax(logits, dim=1).cumsum(1)
                u = batch[3][of.loss_mask].to(below).unsqueeze(1) * below[:, -1:]
                labels = torch.searchsorted(below, u).squeeze(1).clamp_max(logits.shape[1] - 1)
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            return (losses / of.loss_mask.sum(1)[of.rows]).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch[1]

    return ResponseLoss()
