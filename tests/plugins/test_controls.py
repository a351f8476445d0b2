"""Controls: chance is chance, lengths and norms are what they say, the oracle reads labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tdabench_controls import GradNorm, Length, Random, SameTask

from tdabench.api import Context, Corpus, Example, UsageError
from tdabench.groups import Groups


def test_random_scores_are_standard_normal_and_independent(tiny_context):
    from scipy.stats import kstest

    train = Corpus(Example(f"t{i}", "p", "r") for i in range(400))
    queries = Corpus(Example(f"q{i}", "p", "r") for i in range(100))
    s = Random().build(tiny_context, train).score(queries)
    assert kstest(s.ravel(), "norm").pvalue > 0.01
    within = np.corrcoef(s)[np.triu_indices(100, 1)]  # between queries, over 400 examples
    assert abs(within.mean()) < 4 / np.sqrt(400 * len(within))
    assert abs(within.std() - 1 / 20) < 0.005
    assert np.linalg.matrix_rank(s) == 100


def test_random_depends_on_seed_and_ids_only(tiny_context, tiny_corpus, tiny_queries):
    index = Random().build(tiny_context, tiny_corpus)
    s = index.score(tiny_queries)
    other = Random().build(replace(tiny_context, seed=1), tiny_corpus).score(tiny_queries)
    assert abs(np.corrcoef(s.ravel(), other.ravel())[0, 1]) < 0.15
    order = np.random.default_rng(0).permutation(len(tiny_corpus))
    shuffled = Random().build(tiny_context, tiny_corpus.subset(order)).score(tiny_queries[::-1])
    np.testing.assert_array_equal(shuffled, s[::-1][:, order])
    # A query that is also a training example is drawn like any other.
    own = Random().build(tiny_context, tiny_corpus).score(tiny_corpus)
    assert abs(np.diag(own).mean()) < 0.5
    assert index.score([]).shape == (0, len(tiny_corpus))


@pytest.mark.parametrize(
    ("unit", "part", "want"),
    [
        ("words", "response", [2, 1]),
        ("words", "full", [4, 2]),
        ("characters", "response", [7, 3]),
        ("characters", "full", [15, 8]),
    ],
)
def test_length_counts(tiny_context, unit, part, want):
    train = Corpus([Example("a", "say two", "one two"), Example("b", "more", "cat")])
    s = Length(unit=unit, part=part).build(tiny_context, train).score([train[0], train[1]])
    np.testing.assert_array_equal(s, [want, want])


def test_length_in_tokens_is_what_the_loss_averages_over(tiny_context, tiny_corpus, tiny_queries):
    s = Length().build(tiny_context, tiny_corpus).score(tiny_queries)
    tokens = tiny_context.target.tokenize(tiny_corpus)
    assert (s == [len(t) - t.start for t in tokens]).all()


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_gradient_norm_equals_autograd(make_target, tiny_corpus, tmp_path, architecture):
    import torch

    from tdabench.api import example_losses
    from tdabench.targets.batches import pad
    from tdabench.toolkit.gradients import select_layers

    target = make_target(architecture)
    context = Context(target=target, scratch=tmp_path)
    train = tiny_corpus[:8]
    got = GradNorm().build(context, train).score([train[0]])[0]
    model = target.fresh_model("base").requires_grad_(True)
    weights = [m.weight for _, m in select_layers(model)]
    tokens = target.tokenize(train)
    for i in range(len(train)):
        loss = example_losses(model, pad(tokens, np.array([i]), target.pad_id)).sum()
        grads = torch.autograd.grad(loss, weights)
        want = torch.sqrt(sum((g.double() ** 2).sum() for g in grads))
        np.testing.assert_allclose(got[i], float(want), rtol=1e-4)
    only = GradNorm(layers="mlp").build(context, train).score([train[0]])[0]
    assert (only < got).all()
    assert (only > 0).all()


def test_same_task_is_an_indicator(tiny_context, tiny_corpus, tiny_queries):
    s = SameTask().build(tiny_context, tiny_corpus).score(tiny_queries)
    want = np.array(tiny_queries.tasks)[:, None] == np.array(tiny_corpus.tasks)[None]
    np.testing.assert_array_equal(s, want)
    groups = Groups.of([[0, 1, 2], [4, 8]], len(tiny_corpus))
    index = SameTask(pooling="mean").build(tiny_context, tiny_corpus)
    np.testing.assert_allclose(
        index.score_groups(tiny_queries, groups),
        np.stack([want[:, [0, 1, 2]].mean(1), want[:, [4, 8]].mean(1)], axis=1),
        atol=1e-6,
    )


def test_same_task_without_labels(tiny_context, tmp_path):
    some = Corpus([Example("a", "p", "r", "x"), Example("b", "p", "r")])
    none = Corpus([Example("a", "p", "r"), Example("b", "p", "r")])
    index = SameTask().build(tiny_context, some)
    new = [Example("q", "p", "r", "x"), Example("r", "p", "r", "unheard of"), Example("s", "p", "")]
    np.testing.assert_array_equal(index.score(new), [[1, 0], [0, 0], [0, 0]])
    with pytest.raises(UsageError, match="none of the 2 train examples has a task label"):
        SameTask().build(tiny_context, none)
    folder = tmp_path / "index"
    folder.mkdir()
    index.save(folder)
    np.testing.assert_array_equal(
        SameTask().load(tiny_context, folder).score(new), index.score(new)
    )
