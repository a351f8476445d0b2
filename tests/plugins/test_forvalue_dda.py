"""For-Value and DDA against gradients of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tdabench_gradients.dda import DDA
from tdabench_gradients.forvalue import ForValue
from tdabench_gradients.graddot import GradDot

from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.method import Context
from tdabench.targets.target import example_losses
from tdabench.testing import parametrize_with_laws


@parametrize_with_laws([ForValue(), ForValue(errors=None, states=None, normalise=True)])
def test_laws_of_for_value(method, law) -> None:
    law(method)


@parametrize_with_laws([DDA()])
def test_laws_of_dda(method, law) -> None:
    law(method)


@parametrize_with_laws(
    [DDA(normalise=True, debias=0.5, tuned=("warm", "base"))],
    laws=["shapes-and-finiteness", "batches-do-not-matter", "corpus-order-does-not-matter",
          "save-and-load-round-trip", "groups-follow-the-declared-pooling"],
)  # fmt: skip
def test_laws_of_dda_with_other_settings(method, law) -> None:
    law(method)


def test_for_value_is_the_inner_product_of_the_heads_gradients(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    train = tiny_corpus[:9]
    whole = ForValue(errors=None, states=None)
    got = whole.build(tiny_context, train).score(tiny_queries)
    target = tiny_context.target
    model = target.fresh_model("base")
    head = model.get_output_embeddings()
    # A head of its own: tied weights would add the gradients of the embeddings.
    head.weight = torch.nn.Parameter(head.weight.detach().clone())

    def gradients(corpus: Corpus) -> torch.Tensor:
        out = []
        for tokens in target.tokenize(corpus):
            (batch,) = target.batches([tokens])
            loss = example_losses(model, batch).sum()
            out.append(torch.autograd.grad(loss, head.weight)[0].flatten())
        return torch.stack(out)

    want = (gradients(tiny_queries) @ gradients(train).T).numpy()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    sketched = ForValue(errors=48, states=24).build(tiny_context, train).score(tiny_queries)
    assert np.corrcoef(sketched.ravel(), want.ravel())[0, 1] > 0.8


def test_dda_is_the_tuned_inner_product_less_that_of_the_base(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    def dots(**params) -> np.ndarray:  # type: ignore[no-untyped-def]
        return GradDot(**params).build(tiny_context, tiny_corpus).score(tiny_queries)

    got = DDA(debias=0.7).build(tiny_context, tiny_corpus).score(tiny_queries)
    want = dots(checkpoint="warm") - 0.7 * dots(checkpoint="base")
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    plain = DDA(debias=0.0, tuned=("warm", "base")).build(tiny_context, tiny_corpus)
    mean = (dots(checkpoint="warm") + dots(checkpoint="base")) / 2
    np.testing.assert_allclose(plain.score(tiny_queries), mean, atol=1e-5 * np.abs(mean).max())
    for params in ({"tuned": ()}, {"debias": -1.0}):
        with pytest.raises(UsageError):
            DDA(**params)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        ForValue(errors=0)
