"""Selection and removal: the parts by hand, the whole on a tiny target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from constructed import FixedIndex, corpus

from tdabench.benchmark import Stored
from tdabench.benchmarks.removal import Removal, area, matched
from tdabench.benchmarks.retrain import Retrainer, exact_match, greedy, unigram_f1
from tdabench.benchmarks.selection import RULES, Selection, dev_scores, pick, split_tasks
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, UsageError
from tdabench.io import read_arrays, write_arrays
from tdabench.targets.recipe import Recipe

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------ measures


@pytest.mark.parametrize(
    ("response", "wanted", "f1", "exact"),
    [
        ("Paris", "paris", 1.0, 1.0),
        ("a b c", "a  B c ", 1.0, 1.0),
        ("c b a", "a b c", 1.0, 0.0),
        ("a a b", "a b b", 2 / 3, 0.0),
        ("the city of Rome", "Rome", 0.4, 0.0),
        ("", "Rome", 0.0, 0.0),
        ("+501", "501", 1.0, 0.0),
        ("%", "%", 1.0, 1.0),
        ("%", "&", 0.0, 0.0),
    ],
)
def test_f1_and_exact_match(response: str, wanted: str, f1: float, exact: float) -> None:
    assert unigram_f1(response, wanted) == pytest.approx(f1)
    assert exact_match(response, wanted) == exact


def test_area_is_the_mean_height_from_zero() -> None:
    assert area([10], np.array([[1.0]]))[0] == pytest.approx(0.5)
    assert area([10, 20], np.array([[1.0], [1.0]]))[0] == pytest.approx(0.75)
    assert area([10, 50], np.array([[0.0], [1.0]]))[0] == pytest.approx(0.4)
    assert area([5, 7], np.zeros((2, 3))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gpt_neox"])
def test_greedy_responses_do_not_depend_on_the_batch(
    make_target, tiny_corpus: Corpus, architecture: str
) -> None:
    """Padded together, and one token at a time without cache or padding."""
    import torch

    target = make_target(architecture)
    model = target.model("base")
    together = greedy(model, target, tiny_corpus[:12], 8)
    for example, response in zip(tiny_corpus[:12], together):
        ids = torch.from_numpy(target.tokenize([example], role="prompt")[0].ids)[None]
        new = []
        with torch.inference_mode():
            for _ in range(8):
                token = int(model(input_ids=ids).logits[0, -1].argmax())
                if token == target.tokenizer.eos_token_id:
                    break
                new.append(token)
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert response == target.tokenizer.decode(new, skip_special_tokens=True).strip()


# ------------------------------------------------------------------ choosing

TRAIN, QUERIES = corpus(8, "t"), corpus(6, "q")


def context_of(make_context, scores):
    return make_context(FixedIndex(np.asarray(scores), QUERIES.ids), TRAIN, QUERIES)


def test_min_rank_takes_the_best_of_each_query_first(make_context) -> None:
    scores = np.zeros((6, 8))
    scores[0] = [9, 8, 7, 6, 0, 0, 0, 0]
    scores[1] = [0, 0, 0, 0, 0, 0, 8, 9]
    context = context_of(make_context, scores)
    found = dev_scores(context, QUERIES.subset([0, 1]))
    picked = pick("min-rank", found, TRAIN, 4)
    assert set(picked[:2]) == {0, 7}  # best of either
    assert set(picked[2:]) == {1, 6}
    assert set(pick("top", found, TRAIN, 2)) == {0, 7}


def test_softmax_draws_the_best_most_often_and_diverse_passes_over_copies() -> None:
    from tdabench.data.examples import Example

    high = np.zeros((1, 8), dtype=np.float32)
    high[0, 5] = 50.0
    assert pick("softmax", high, TRAIN, 1).tolist() == [5]
    copies = Corpus([Example(f"c{i}", "a question of some length", "one answer") for i in range(6)]
                    + [TRAIN[0], Example("z", "quite another", "thing")], "t")  # fmt: skip
    falling = -np.arange(8, dtype=np.float32)[None]
    assert pick("min-rank", falling, copies, 3).tolist() == [0, 1, 2]
    picked = pick("diverse", falling, copies, 8).tolist()
    assert picked[:3] == [0, 6, 7]
    assert picked[-5:] == [1, 2, 3, 4, 5]  # copies of the first come last


def test_a_constant_method_picks_at_random_and_not_the_first_lines(make_context) -> None:
    for rule in RULES:
        picked = pick(rule, np.zeros((2, 8), dtype=np.float32), TRAIN, 8)
        assert sorted(picked) == list(range(8))
        assert picked.tolist() != list(range(8))


def test_tasks_are_split_without_overlap() -> None:
    parts, notes = split_tasks(QUERIES, dev=1, limit=0)
    assert [p[0] for p in parts] == ["task0", "task1"]
    assert notes == []
    for task, dev, unseen in parts:
        assert len(dev) == 1
        assert not set(dev) & set(unseen)
        assert {QUERIES[i].task for i in dev + unseen} == {task}
    assert len(split_tasks(QUERIES, 1, 1)[0]) == 1
    with pytest.raises(DataError, match="no task has more than 3 queries"):
        split_tasks(QUERIES, 3, 0)
    with pytest.raises(UsageError, match="min-rank, top, softmax, diverse"):
        Selection(rule="best")
    with pytest.raises(UsageError, match="loss, exact_match, f1"):
        Selection(measure="bleu")


# ------------------------------------------------------------------ the whole, tiny

QUICK = "lr=5e-3,batch_size=8,epochs="


@pytest.fixture
def tiny(make_context, tiny_target, tiny_corpus: Corpus, tiny_queries: Corpus):
    """A context whose scores know the task of every example (or its negative)."""

    def of(sign: float, **more):
        same = np.array([[float(a == b) for b in tiny_corpus.tasks] for a in tiny_queries.tasks])
        index = FixedIndex(sign * same, tiny_queries.ids)
        return make_context(index, tiny_corpus, tiny_queries, target=tiny_target, **more)

    return of


def test_selecting_the_own_task_beats_selecting_any_other(tiny) -> None:
    benchmark = Selection(
        k=(12,), dev=1, tasks=0, random_seeds=1, max_new_tokens=6, replicates=50, recipe=QUICK + "4"
    )
    good, poor = benchmark.run(tiny(1.0)), benchmark.run(tiny(-1.0))
    assert good.metrics["loss@12"].value < poor.metrics["loss@12"].value
    assert good.metrics["loss@12"].value < good.metrics["loss_random@12"].value
    for name in ("f1", "f1_random", "f1_oracle", "exact_match@12", "f1_full@60"):
        assert 0 <= good.metrics[name].value <= 1
    # What does not depend on the method is the same for both.
    for name in ("f1_random", "f1_oracle", "loss_full@60", "loss_random@12"):
        assert good.metrics[name] == poor.metrics[name]
    assert good.primary == "f1"
    assert len(good.per_query) == len(good.query_ids) == 8


def test_selection_can_be_judged_by_loss(tiny) -> None:
    benchmark = Selection(
        k=(6, 12), measure="loss", dev=1, tasks=2, random_seeds=1, max_new_tokens=2,
        replicates=50, recipe=QUICK + "1",
    )  # fmt: skip
    out = benchmark.run(tiny(1.0))
    m = out.metrics
    assert not m["loss"].higher_is_better
    assert m["loss"].value == pytest.approx((m["loss@6"].value + m["loss@12"].value) / 2)
    gain = m["loss_random"].value - m["loss"].value
    assert m["gain_over_random"].value == pytest.approx(gain)
    assert out.arrays["replicates_df"].tolist() == [1, 1, 2]  # two tasks, the only clusters
    assert out.arrays["picked"].shape == (2, 12)


def test_the_same_choice_is_trained_once_and_a_damaged_result_again(tiny, tmp_path) -> None:
    context = tiny(1.0, cache=tmp_path / "cache")
    recipe = Recipe(epochs=1, batch_size=8)
    trainer = Retrainer(context, recipe, max_new_tokens=4)
    queries = context.queries[:3]
    first = trainer.run([3, 1, 2], queries, 0)
    assert trainer.done == 1
    again = Retrainer(context, recipe, max_new_tokens=4)
    second = again.run(np.array([1, 2, 3]), queries, 0)
    assert again.done == 0
    np.testing.assert_array_equal(first.losses, second.losses)
    assert first.responses == second.responses
    for changed in (
        lambda: again.run([1, 2, 4], queries, 0),
        lambda: again.run([1, 2, 3], queries, 1),
        lambda: again.run([1, 2, 3], context.queries[:2], 0),
        lambda: Retrainer(context, Recipe(epochs=2, batch_size=8)).run([1, 2, 3], queries, 0),
    ):
        before = len(list((tmp_path / "cache").iterdir()))
        changed()
        assert len(list((tmp_path / "cache").iterdir())) == before + 1
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    np.testing.assert_array_equal(again.run([1, 2, 3], queries, 0).losses, first.losses)


def test_losses_that_someone_else_kept_are_not_believed(tiny, tmp_path) -> None:
    """The file is whole and names the same retraining; only its seal tells that it was altered."""
    context = tiny(1.0, cache=tmp_path / "cache")
    trainer = Retrainer(context, Recipe(epochs=1, batch_size=8))
    first = trainer.run([1, 2, 3], context.queries[:3], 0)
    (path,) = (tmp_path / "cache").iterdir()
    arrays, meta = read_arrays(path)
    write_arrays(path, {"losses": arrays["losses"] - 1.0}, meta)
    again = trainer.run([1, 2, 3], context.queries[:3], 0)
    assert trainer.done == 2
    np.testing.assert_array_equal(again.losses, first.losses)


def test_models_that_share_an_order_differ_by_what_they_lack(tiny, tmp_path) -> None:
    """Leaving out of a pool by weight: nothing left out is the plain training of the pool."""
    context = tiny(1.0, cache=tmp_path / "cache")
    trainer = Retrainer(context, Recipe(epochs=2, batch_size=4))
    pool, queries = np.arange(3, 19), context.queries[:4]
    whole = trainer.run(pool, queries, 0, among=pool)
    np.testing.assert_array_equal(whole.losses, trainer.run(pool, queries, 0).losses)
    less = trainer.run(pool[1:], queries, 0, among=pool)
    apart = trainer.run(pool[1:], queries, 0)  # the seed orders 15 examples, not 16
    near, far = (np.abs(r.losses - whole.losses).mean() for r in (less, apart))
    assert 0 < near < far


def test_removing_the_own_task_raises_the_loss_more_than_removing_others(tiny) -> None:
    benchmark = Removal(
        n=3, k=(7,), fraction=0.5, random_seeds=1, replicates=50, recipe=QUICK + "5"
    )
    good, poor = benchmark.run(tiny(1.0)), benchmark.run(tiny(-1.0))
    assert good.metrics["removal"].value > poor.metrics["removal"].value
    assert good.metrics["rise@7"].value > 0
    assert good.metrics["rise_random@7"] == poor.metrics["rise_random@7"]
    expected = (good.metrics["rise@7"].value - good.metrics["rise_random@7"].value) / 2
    assert good.metrics["removal"].value == pytest.approx(expected)


def test_a_matched_removal_looks_like_the_one_it_is_compared_with() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat(["a", "b", "c"], 20)
    lengths = np.concatenate([rng.permutation(20), 100 + rng.permutation(20), [7] * 20])
    removed = np.array([0, 1, 2, 25, 45])
    got = matched(removed, list(kinds), lengths, np.random.default_rng(1))
    assert list(kinds[got]) == list(kinds[removed])
    assert len(set(got)) == 5
    assert not set(got) & set(removed)
    assert np.abs(lengths[got] - lengths[removed]).max() <= 6
    again = matched(removed, list(kinds), lengths, np.random.default_rng(2))
    assert list(again) != list(got)
    # Where a kind runs out, any example is taken; where all do, fewer.
    all_a = matched(np.arange(15), list(kinds), lengths, np.random.default_rng(1))
    assert list(kinds[all_a]) == ["a"] * 5 + list(kinds[all_a[5:]])
    assert len(set(all_a)) == 15
    assert len(matched(np.arange(58), list(kinds), lengths, np.random.default_rng(1))) == 2


def test_matched_controls_and_opponents(tiny) -> None:
    options = {"n": 3, "k": (4,), "fraction": 0.5, "random_seeds": 1, "replicates": 50}
    plain = Removal(**options, recipe=QUICK + "3")
    strict = Removal(**options, recipe=QUICK + "3", matched=2, opponents=True)
    a, b = plain.run(tiny(1.0)).metrics, strict.run(tiny(1.0)).metrics
    assert set(b) - set(a) == {"rise_matched@4", "rise_opponents@4", "spread"}
    assert b["rise@4"].value == a["rise@4"].value
    half = (b["rise@4"].value - b["rise_matched@4"].value) / 2
    assert b["removal"].value == pytest.approx(half)
    assert b["spread"].value == pytest.approx((b["rise@4"].value - b["rise_opponents@4"].value) / 2)
    # The opponents of scores are the proponents of their negation.
    c = Removal(**options, recipe=QUICK + "3", opponents=True).run(tiny(-1.0)).metrics
    assert c["spread"].value < b["spread"].value
    with pytest.raises(UsageError, match="matched"):
        Removal(matched=-1)


def test_a_removal_can_be_of_behaviours(tiny) -> None:
    """Sets of queries of one task; a set of one query is that query."""
    options = {"k": (7,), "fraction": 0.5, "random_seeds": 1, "replicates": 50}
    sets = Removal(**options, n=9, behaviours="task", recipe=QUICK + "5")
    good, poor = sets.run(tiny(1.0)), sets.run(tiny(-1.0))
    context = tiny(1.0)
    assert list(good.query_ids) == sorted(set(context.queries.tasks))
    assert good.metrics["removal"].value > poor.metrics["removal"].value
    assert good.notes[0].startswith(f"{len(good.query_ids)} behaviours (by 'task')")
    again = sets.recompute(Stored(good.arrays, good.query_ids, None, None))  # type: ignore[arg-type]
    assert again.metrics == good.metrics
    # Its rise is the mean rise of the members, without the examples that help the set most.
    alone = [Example(e.id, e.prompt, e.response, e.task, {"own": e.id}) for e in context.queries]
    queries = Corpus(alone[:3], "three")
    plain = Removal(**options, n=3, recipe=QUICK + "5").run(replace(context, queries=queries))
    single = Removal(**options, n=3, behaviours="own", recipe=QUICK + "5")
    np.testing.assert_allclose(
        np.sort(single.run(replace(context, queries=queries)).per_query),
        np.sort(plain.per_query), atol=1e-5,
    )  # fmt: skip
    with pytest.raises(DataError, match="no query has the field 'tone'"):
        Removal(k=(5,), behaviours="tone").run(context)


def test_removing_everything_is_refused(tiny) -> None:
    with pytest.raises(DataError, match="leaves no training examples"):
        Removal(n=2, k=(30,), fraction=0.5).run(tiny(1.0))
    with pytest.raises(UsageError, match="fraction"):
        Removal(fraction=0.0)


def test_what_another_process_trains_is_left_to_it_and_then_taken_over(tiny, tmp_path) -> None:
    """Two workers share the baselines out: each run is trained once, and both have them all."""
    import fcntl
    import threading

    context = tiny(1.0, cache=tmp_path / "cache")
    recipe, queries = Recipe(epochs=1, batch_size=8), context.queries[:3]
    alone = Retrainer(context, recipe)
    wanted = alone.run([1, 2, 3], queries, 0)
    (result,) = (tmp_path / "cache").iterdir()
    aside, lock = tmp_path / "aside", result.with_suffix(".lock")
    result.rename(aside)

    trainer = Retrainer(context, recipe)
    with open(lock, "w") as other:  # another process is at work on it
        fcntl.flock(other, fcntl.LOCK_EX)
        trainer.begin([([1, 2, 3], 0), ([4, 5, 6], 0)], queries)
        assert trainer.done == 1
        assert not result.exists()

        def finish() -> None:
            aside.rename(result)
            fcntl.flock(other, fcntl.LOCK_UN)

        timer = threading.Timer(0.3, finish)
        timer.start()
        found = trainer.run([1, 2, 3], queries, 0)  # waits
        timer.join()
    np.testing.assert_array_equal(found.losses, wanted.losses)
    trainer.run([4, 5, 6], queries, 0)
    assert trainer.done == 1
