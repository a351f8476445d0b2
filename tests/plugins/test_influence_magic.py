"""MAGIC against training itself: the recipe's own loop, and retraining with altered weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tdabench_influence import magic as module
from tdabench_influence.magic import MAGIC, MagicIndex
from tdabench_influence.training import Run, State

from tdabench.data.examples import Corpus
from tdabench.errors import MethodError, UsageError
from tdabench.method import Context
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target
from tdabench.targets.training import batch_order, finetune
from tdabench.testing import parametrize_with_laws

ROUGH = "batch_size=8,clip=0.8,weight_decay=0.1,eps=1e-6"  # every branch is taken


@parametrize_with_laws(
    [MAGIC(recipe="epochs=1,batch_size=36")],
    laws=["described", "parameters-are-checked", "shapes-and-finiteness", "batches-do-not-matter",
          "corpus-order-does-not-matter", "save-and-load-round-trip", "globals-are-untouched",
          "second-call-equals-the-first"],
)  # fmt: skip
def test_laws(method, law) -> None:
    """Those that a method could break that is slow; `tdabench check magic` asks all of them."""
    law(method)


@pytest.fixture
def context(tiny_target: Target, tmp_path: Path) -> Context:
    return Context(target=tiny_target, scratch=tmp_path)


def trained(run: Run) -> torch.Tensor:
    """theta [dim] after the last step."""
    return list(run.forwards(run.start, 0, len(run)))[-1].theta


def losses(run: Run, theta: torch.Tensor, queries: Corpus) -> np.ndarray:
    target = run.context.target
    out = np.empty(len(queries))
    with torch.no_grad():
        for batch in target.batches(target.tokenize(queries)):
            out[batch.index] = run._losses(run._named(theta), batch).double().numpy()
    return out


@pytest.mark.parametrize("recipe", [{}, {"weight_decay": 0.1, "clip": 0.5, "warmup": 0.3}])
def test_the_run_is_the_recipe_that_truths_are_made_by(
    context: Context, tiny_corpus: Corpus, recipe: dict
) -> None:
    target, train = context.target, tiny_corpus[:20]
    settings = Recipe(batch_size=20, epochs=3, **recipe)  # whole batches: any order is the same
    tokens = target.tokenize(train)
    theirs = finetune(target.fresh_model("base"), tokens, settings, 0, target.pad_id)
    run = Run(context, target.fresh_model("base"), tokens, [np.arange(20)] * 3, settings)
    want = torch.cat([p.detach().flatten() for p in theirs.parameters()])
    # Adam magnifies rounding where gradients are next to nothing: look at the whole vector.
    off, moved = (trained(run) - want).norm(), (want - run.start.theta).norm()
    assert float(off / moved) < 1e-3


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scores_equal_retraining_with_altered_weights(
    make_target, tmp_path: Path, tiny_corpus: Corpus, tiny_queries: Corpus, share: float
) -> None:
    # GPT-2 keeps float64 throughout; Qwen2 normalises in float32.
    context = Context(target=make_target("gpt2"), scratch=tmp_path)
    train, queries = tiny_corpus[:20], tiny_queries[:4]
    method = MAGIC(precision="float64", share=share, recipe=ROUGH)
    index = method.build(context, train)
    found = -index._metagradients(context.target.tokenize(queries), 0, len(queries))
    for i in (0, 7, 19):
        sides = []
        for step in (1e-6, -1e-6):
            run = method.run(context, train, index.run.orders)
            run.weights[i] += step
            sides.append(-losses(run, trained(run), queries))
        want = (sides[0] - sides[1]) / 2e-6  # of -loss: positive is helpful
        assert np.abs(found[:, i] - want).max() / np.abs(found[:, i]).max() < 1e-4


def test_one_step_of_sgd_like_adam_by_hand(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    """A huge eps makes the first step -lr g / eps: d loss_q / d w_i = -lr / (n eps) g_q . g_i."""
    train, queries = tiny_corpus[:6], tiny_queries[:3]
    method = MAGIC(share=1.0, recipe="epochs=1,batch_size=6,eps=1e6,clip=0.0,lr=1.0")
    index = method.build(context, train)
    run, tokens = index.run, context.target.tokenize
    g = run.query_gradients(run.start.theta, tokens(train)).double()
    q = run.query_gradients(index.kept[1].theta, tokens(queries)).double()
    want = (q @ g.T).numpy() / (6 * 1e6)
    got = index.score(queries)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-4


def test_segments_and_query_blocks_change_nothing(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = MAGIC(share=1.0, recipe=ROUGH)
    index = method.build(context, tiny_corpus[:30])
    steps = len(index.run)
    assert steps == 8
    assert sorted(index.kept) == [*range(0, steps, math.isqrt(steps)), steps][: len(index.kept)]
    want = index.score(tiny_queries[:5])
    every = {0: index.run.start}
    every |= dict(enumerate(index.run.forwards(index.run.start, 0, steps), start=1))
    whole = MagicIndex(method, context, list(tiny_corpus[:30]), index.run, every)
    np.testing.assert_array_equal(whole.score(tiny_queries[:5]), want)
    monkeypatch.setattr(module, "QUERY_BYTES", 8 * index.run.dim * 4 * 2)
    np.testing.assert_allclose(index.score(tiny_queries[:5]), want, rtol=1e-3, atol=1e-6)


def test_a_coordinate_that_never_moved_has_no_derivative(context: Context) -> None:
    run = Run(context, context.target.fresh_model("base"), [], [], Recipe())
    run.orders = [np.empty(0, dtype=np.int64)]
    later = State(*(torch.ones(1, run.dim) for _ in range(3)))
    run.gradient = lambda theta, k: torch.zeros_like(theta)  # type: ignore[method-assign]
    nothing = (np.empty(0, dtype=np.int64), (torch.zeros(1, run.dim), torch.zeros(1, 0)))
    run._batches = lambda k, compute: iter([nothing])  # type: ignore[method-assign]
    before, _, _ = run.backwards(run.start, 0, later)
    assert all(bool(torch.isfinite(getattr(before, n)).all()) for n in State.names)


def test_bad_settings_are_refused(context: Context, tiny_corpus: Corpus) -> None:
    for settings, what in (
        ({"share": 0.0}, "share must be in"),
        ({"precision": "float16"}, "unknown precision"),
        ({"recipe": "epochs=0"}, "epochs = 0"),
        ({"pooling": "max"}, "unknown pooling"),
    ):
        with pytest.raises(UsageError, match=what):
            MAGIC(**settings)
    with pytest.raises(MethodError, match="diverged at step"):
        MAGIC(share=1.0, recipe="lr=1e30,epochs=3,batch_size=4").build(context, tiny_corpus[:8])


def test_follows_the_order_of_a_truths_run(context: Context, tiny_corpus: Corpus) -> None:
    """With share 1 it is the very training behind a truth with `order = "pool"`."""
    train = tiny_corpus[:20]
    recipe = Recipe(lr=1e-3, epochs=2, batch_size=6, eps=1e-3)
    context = replace(context, target=replace(context.target, recipe=recipe))
    index = MAGIC(share=1.0, follow="toy-tiny-loo-s00").build(context, train)
    target, seed = context.target, named_seed(0, "toy-tiny-loo-s00")
    for mine, theirs in zip(index.run.orders, batch_order(20, recipe, seed), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    theirs = finetune(
        target.fresh_model("base"), target.tokenize(train), recipe, seed, target.pad_id
    )
    want = torch.cat([p.detach().flatten() for p in theirs.parameters()])
    end = index.kept[len(index.run)].theta
    assert float((end - want).norm() / (want - index.run.start.theta).norm()) < 1e-3


def test_other_recipes_than_adamw_on_all_weights_are_refused(
    context: Context, tiny_corpus: Corpus
) -> None:
    for recipe, what in (
        (Recipe(lora_rank=2), "lora_rank=2"),
        (Recipe(optimizer="sgd"), "optimizer=sgd"),
        (Recipe(max_steps=3), "max_steps=3"),
    ):
        other = replace(context, target=replace(context.target, recipe=recipe))
        with pytest.raises(UsageError, match=what):
            MAGIC().build(other, tiny_corpus[:8])
    half = replace(context, target=replace(context.target, fraction=0.5))
    assert MAGIC().share_of(half) == 0.5
    assert MAGIC(share=1.0).share_of(half) == 1.0


def test_warming_up_differentiates_one_step(
    context, tiny_corpus, tiny_queries, monkeypatch
) -> None:
    index = MAGIC().build(context, tiny_corpus)
    expected = index.score(tiny_queries[:2])
    steps: list[int] = []
    backwards = Run.backwards

    def counted(self, state, k, later):
        steps.append(k)
        return backwards(self, state, k, later)

    monkeypatch.setattr(Run, "backwards", counted)
    index.warm_up(tiny_queries[:1])
    assert steps == [len(index.run) - 1]
    np.testing.assert_array_equal(index.score(tiny_queries[:2]), expected)
    assert len(steps) == 1 + len(index.run)
