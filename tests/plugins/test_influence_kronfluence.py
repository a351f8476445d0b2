"""EK-FAC and K-FAC against kronfluence on the same model, data, Fisher and biases."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tdabench_influence.ekfac import EKFAC, KFAC
from tdabench_influence.identity import Identity
from tdabench_influence.streaming import StreamingMethod

from tdabench.data.examples import Corpus
from tdabench.method import Context
from tdabench.targets.batches import Batch, pad
from tdabench.targets.target import Target, example_losses

pytest.importorskip("kronfluence")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def kronfluence_scores(
    target: Target, train: Corpus, queries: Corpus, strategy: str, folder: Path
) -> np.ndarray:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    from tdabench.toolkit.gradients import select_layers

    class Data(torch.utils.data.Dataset):
        def __init__(self, corpus: Corpus) -> None:
            tokens = target.tokenize(corpus)
            b = pad(tokens, np.arange(len(tokens)), target.pad_id)
            self.rows = list(zip(b.input_ids, b.attention_mask, b.loss_mask))

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Any:
            return self.rows[i]

    names = [name for name, _ in select_layers(target.model("base"))]

    class ResponseLoss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            assert not sample  # the empirical Fisher: labels drawn elsewhere would not be ours
            return example_losses(model, Batch(np.arange(len(batch[0])), *batch)).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch[1]

    task = ResponseLoss()
    model = prepare_model(target.fresh_model("base"), task)
    analyzer = Analyzer(
        "parity",
        model,
        task,
        cpu=True,
        output_dir=str(folder),
        disable_tqdm=True,
        log_level=logging.ERROR,
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
    analyzer.fit_all_factors(
        "factors",
        Data(train),
        per_device_batch_size=16,
        factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        Data(queries),
        Data(train),
        per_device_query_batch_size=6,
        per_device_train_batch_size=16,
        score_args=ScoreArguments(damping_factor=None),  # 0.1 times the mean eigenvalue
    )
    return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        (EKFAC(fisher="empirical", damping=0.1), "ekfac"),
        (KFAC(fisher="empirical", damping=0.1), "kfac"),
        (Identity(), "identity"),
    ],
)
def test_scores_equal_kronfluence(
    tiny_target: Target,
    tiny_corpus: Corpus,
    tiny_queries: Corpus,
    tmp_path: Path,
    method: StreamingMethod,
    strategy: str,
) -> None:
    context = Context(target=tiny_target, scratch=tmp_path / "ours")
    ours = method.build(context, tiny_corpus).score(tiny_queries)
    theirs = kronfluence_scores(
        tiny_target, tiny_corpus, tiny_queries, strategy, tmp_path / "theirs"
    )
    if strategy == "kfac":  # K-FAC's factor T, the mean tokens of an example, is ours alone
        tokens = tiny_target.tokenize(tiny_corpus)
        ours = ours * np.mean([len(t) for t in tokens])
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4
