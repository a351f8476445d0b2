"""Truth: plans, units, builds that stop and go on, and the guards around them."""

import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tdabench.data import Corpus
from tdabench.errors import DataError, GuardError, UsageError
from tdabench.groups import Groups
from tdabench.io import read_arrays, write_arrays
from tdabench.targets import Recipe, Target
from tdabench.targets.decoder import Decoder
from tdabench.truth import Truth, TruthPlan, Unit, build, collect, finished
from tdabench.truth.build import UnitTrainer

RECIPE = Recipe(lr=3e-3, epochs=1, batch_size=8)  # as the fixture `plan` has it


def test_a_draw_depends_on_name_and_seed_only(plan, parts):
    target, train, queries = parts
    kw = {"n_groups": 3, "fraction": 0.25, "n_seeds": 2, "recipe": RECIPE}
    assert TruthPlan.draw("tiny", target, train, queries, **kw).key == plan.key
    assert TruthPlan.draw("tiny", target, train, queries, **kw, seed=1).key != plan.key
    other = TruthPlan.draw("other", target, train, queries, **kw)
    assert other.groups.fingerprint != plan.groups.fingerprint
    assert (plan.groups.sizes == 15).all()


def test_a_plan_may_repeat_the_groups_of_another(plan, parts):
    kw = {"n_groups": 3, "fraction": 0.25, "n_seeds": 2, "recipe": RECIPE}
    other = TruthPlan.draw("other", *parts, **kw, groups_of="tiny")
    assert other.groups.fingerprint == plan.groups.fingerprint
    assert other.key != plan.key
    assert other.run_seed(Unit(0, 0)) != plan.run_seed(Unit(0, 0))


def test_with_order_pool_a_seed_orders_all_groups_alike(parts, tmp_path):
    from tdabench.targets import finetune

    target, train, queries = parts
    kw = {"n_groups": 2, "fraction": 0.9, "n_seeds": 2, "recipe": RECIPE}
    plan = TruthPlan.draw("tiny", *parts, **kw, order="pool")
    own = TruthPlan.draw("tiny", *parts, **kw)
    assert plan.key != own.key
    assert plan.groups.fingerprint == own.groups.fingerprint
    assert plan.run_seed(Unit(0, 1)) == plan.run_seed(Unit(1, 1)) != plan.run_seed(Unit(0, 0))
    plan.save(tmp_path / "p.safetensors")
    assert TruthPlan.load(tmp_path / "p.safetensors").order == "pool"
    with pytest.raises(UsageError, match="order"):
        TruthPlan.draw("tiny", *parts, **kw, order="mine")

    unit = Unit(1, 0)
    tokens, seed = target.tokenize(train), plan.run_seed(unit)
    keep = np.isin(np.arange(len(train)), plan.groups[1])
    model = target.fresh_model("base")
    finetune(model, tokens, RECIPE, seed, target.pad_id, weights=keep)
    expected = target.losses(model, target.tokenize(queries))
    np.testing.assert_array_equal(UnitTrainer.of(plan, *parts).losses(unit), expected)

    # Leaving nothing out is the plain training, and what is left out is never read.
    whole, plain = target.fresh_model("base"), target.fresh_model("base")
    finetune(whole, tokens, RECIPE, seed, target.pad_id, weights=np.ones(len(train), dtype=bool))
    finetune(plain, tokens, RECIPE, seed, target.pad_id)
    for a, b in zip(whole.parameters(), plain.parameters()):
        assert (a == b).all()
    other = [t if k else tokens[0] for t, k in zip(tokens, keep)]
    again = target.fresh_model("base")
    finetune(again, other, RECIPE, seed, target.pad_id, weights=keep)
    np.testing.assert_array_equal(target.losses(again, target.tokenize(queries)), expected)


@pytest.mark.parametrize("fraction", [0.02, 0.25, 1.0])
def test_groups_survive_a_truth_file_in_either_form(fraction, tmp_path):
    rng = np.random.default_rng(0)
    groups = Groups.random(4, 203, fraction, rng)
    truth = Truth(np.zeros((4, 1, 1), dtype=np.float32), groups, ("q",), {"name": "t"})
    truth.save(tmp_path / "t.safetensors")
    arrays, _ = read_arrays(tmp_path / "t.safetensors")
    assert ("members" in arrays) == (fraction > 0.1)
    loaded = Truth.load(tmp_path / "t.safetensors")
    assert loaded.groups.fingerprint == groups.fingerprint
    assert loaded.query_ids == ("q",)


def test_a_plan_survives_its_file(plan, tmp_path):
    plan.save(tmp_path / "p.safetensors")
    assert TruthPlan.load(tmp_path / "p.safetensors").key == plan.key
    write_arrays(tmp_path / "x.safetensors", {"a": np.zeros(1)})
    with pytest.raises(DataError, match="not a truth plan"):
        TruthPlan.load(tmp_path / "x.safetensors")


def test_a_unit_is_a_finetuning_from_base_evaluated_on_every_query(plan, parts):
    from tdabench.targets import finetune

    target, train, queries = parts
    trainer = UnitTrainer.of(plan, *parts)
    unit = Unit(1, 0)
    members = target.tokenize(train.subset(plan.groups[1]))
    model = finetune(
        target.fresh_model("base"), members, RECIPE, plan.run_seed(unit), target.pad_id
    )
    expected = target.losses(model, target.tokenize(queries))
    np.testing.assert_array_equal(trainer.losses(unit), expected)
    assert not np.array_equal(trainer.losses(Unit(1, 1)), expected)


@pytest.mark.parametrize("order", ["own", "pool"])
def test_layers_below_the_first_adapter_are_computed_once(parts, monkeypatch, order):
    """Losses of a unit are those of a training on its tokens, up to rounding."""
    recipe = Recipe(lr=1e-2, batch_size=8, eps=1e-4, lora_rank=2, layers_to_transform=(1,))
    plan = TruthPlan.draw(
        "tiny", *parts, n_groups=2, fraction=0.5, n_seeds=2, recipe=recipe, order=order
    )
    units = plan.units()
    with monkeypatch.context() as m:
        m.setattr("tdabench.truth.engines.states_below", lambda *_: None)
        plain = [UnitTrainer.of(plan, *parts).losses(u) for u in units]
    genuine, layers = Decoder._through, []
    monkeypatch.setattr(
        Decoder, "_through", lambda self, i, *rest: layers.append(i) or genuine(self, i, *rest)
    )
    trainer = UnitTrainer.of(plan, *parts)
    first = trainer.losses(units[0])
    assert 0 in layers
    layers.clear()
    cached = [first, *(trainer.losses(u) for u in units[1:])]
    assert set(layers) == {1}
    np.testing.assert_allclose(cached, plain, atol=5e-5)
    assert np.abs(np.diff(plain, axis=0)).max() > 1e-3
    # A unit's losses do not depend on which units were trained before it.
    np.testing.assert_array_equal(UnitTrainer.of(plan, *parts).losses(units[-1]), cached[-1])


def test_weights_from_scratch_share_no_states(parts):
    recipe = Recipe(lr=1e-2, batch_size=8, lora_rank=2, layers_to_transform=(1,))
    kw = {"n_groups": 1, "fraction": 0.5, "n_seeds": 2, "recipe": recipe, "start": "scratch"}
    plan = TruthPlan.draw("tiny", *parts, **kw)
    trainer = UnitTrainer.of(plan, *parts)
    one, other = (trainer.losses(u) for u in plan.units())
    np.testing.assert_array_equal(UnitTrainer.of(plan, *parts).losses(plan.units()[1]), other)
    assert np.abs(one - other).max() > 1e-3


def test_a_truth_says_where_memory_ran_out(plan, parts, tmp_path, monkeypatch):
    original = Decoder.gradient

    def small(self, batch, each, below):
        if len(batch.input_ids) > 5:
            raise MemoryError
        return original(self, batch, each, below)

    monkeypatch.setattr(Decoder, "gradient", small)
    assert build(plan, *parts, tmp_path) == []
    got = collect(plan, tmp_path)
    assert set(got.plan["made_by"]) <= {f"micro-batches of {n}" for n in (2, 3, 4)}
    monkeypatch.undo()
    build(plan, *parts, tmp_path / "whole")
    np.testing.assert_allclose(got.losses, collect(plan, tmp_path / "whole").losses, atol=2e-4)


def test_stop_go_on_and_shards_give_the_same_truth(plan, parts, tmp_path):
    assert build(plan, *parts, tmp_path / "whole") == []
    whole = collect(plan, tmp_path / "whole")
    assert np.isfinite(whole.losses).all()

    build(plan, *parts, tmp_path / "split", shard=(0, 2))
    assert len(finished(plan, tmp_path / "split")) == 3
    with pytest.raises(DataError, match=r"3 of 6 retrainings.*g00001-s00"):
        collect(plan, tmp_path / "split")
    (tmp_path / "split" / "units" / "g00000-s00.safetensors").unlink()
    done = []
    build(plan, *parts, tmp_path / "split", on_unit=lambda u, reason: done.append(u))
    assert len(done) == 4  # the other shard and the lost unit, nothing twice
    np.testing.assert_array_equal(collect(plan, tmp_path / "split").losses, whole.losses)

    for name in ("whole", "split"):
        collect(plan, tmp_path / name).save(tmp_path / f"{name}.safetensors")
    saved = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("whole", "split")]
    assert saved[0] == saved[1]


BUILD = """
import pickle, sys
from pathlib import Path
from tdabench.truth import build
if __name__ == "__main__":
    build(*pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), workers=2)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_killed_outright_a_build_leaves_no_worker_and_goes_on(plan, parts, tmp_path):
    (tmp_path / "b.py").write_text(BUILD)
    (tmp_path / "args").write_bytes(pickle.dumps((plan, *parts)))
    folder = tmp_path / "work"
    process = subprocess.Popen([sys.executable, tmp_path / "b.py", tmp_path / "args", folder])
    deadline = time.monotonic() + 600
    while not finished(plan, folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert workers
    deadline = time.monotonic() + 120
    while any(alive(w) for w in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [w for w in workers if alive(w)]
    kept = {p.name: p.read_bytes() for p in (folder / "units").glob("*.safetensors")}
    assert kept
    build(plan, *parts, folder)
    truth = collect(plan, folder)
    build(plan, *parts, tmp_path / "whole")
    np.testing.assert_array_equal(truth.losses, collect(plan, tmp_path / "whole").losses)
    for name, data in kept.items():
        assert (folder / "units" / name).read_bytes() == data


def children(pid):
    """Processes below `pid`, at any depth."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(status.parent.name)
            found += [child, *children(child)]
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_another_plans_folder_or_row_is_refused(plan, parts, tmp_path):
    build(plan, *parts, tmp_path / "a", shard=(0, 6))
    other = TruthPlan.draw("other", *parts, n_groups=3, fraction=0.25, n_seeds=2, recipe=RECIPE)
    with pytest.raises(DataError, match="another truth"):
        build(other, *parts, tmp_path / "a")
    row = tmp_path / "a" / "units" / "g00000-s00.safetensors"
    arrays, _ = read_arrays(row)
    write_arrays(row, arrays, {"unit": "g00000-s00", "plan": "0" * 16})
    with pytest.raises(DataError, match="another plan"):
        collect(plan, tmp_path / "a")


def test_queries_among_the_training_examples_are_refused(parts):
    target, train, queries = parts
    leaky = Corpus([*queries, train[3]], "leaky")
    with pytest.raises(GuardError, match=train[3].id):
        TruthPlan.draw(
            "x", target, train, leaky, n_groups=1, fraction=0.5, n_seeds=1, recipe=RECIPE
        )


def test_groups_smaller_than_a_batch_are_refused(parts):
    with pytest.raises(UsageError, match=r"groups of 6 examples .* smaller than a batch .* \(8\)"):
        TruthPlan.draw("x", *parts, n_groups=1, fraction=0.1, n_seeds=1, recipe=RECIPE)


def test_a_truth_is_of_one_corpus_and_one_target(plan, parts, tmp_path):
    target, train, queries = parts
    rng = np.random.default_rng(0)
    losses = rng.standard_normal((3, 2, len(queries))).astype(np.float32)
    truth = Truth(losses, plan.groups, plan.query_ids, plan.describe())
    truth.save(tmp_path / "t.safetensors")
    truth = Truth.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(truth.losses, losses)
    assert truth.plan["recipe"] == RECIPE.as_dict()
    np.testing.assert_allclose(truth.values, -losses.mean(1).T, rtol=1e-6)
    assert truth.by_seed().shape == (2, len(queries), 3)
    with pytest.raises(GuardError, match=r"another recipe .*: lr 0.003 \(0.001\), epochs 1 \(2\)"):
        truth.check(train, target)  # which declares the default
    truth.check(train, target, RECIPE)
    target = replace(target, recipe=RECIPE)
    truth.check(train, target)
    with pytest.raises(GuardError, match="training corpus"):
        truth.check(train[:59], target)
    other = Target(**{**target.__getstate__(), "template": "alpaca"})
    with pytest.raises(GuardError, match="target"):
        truth.check(train, other)
    with pytest.raises(GuardError, match="plan"):
        build(plan, other, train, queries, tmp_path / "b")


def test_queries_are_picked_by_id_in_the_order_asked(plan):
    losses = np.arange(3 * 2 * 12, dtype=np.float32).reshape(3, 2, 12)
    truth = Truth(losses, plan.groups, plan.query_ids, plan.describe())
    ids = [plan.query_ids[7], plan.query_ids[2]]
    np.testing.assert_array_equal(truth.for_queries(ids).losses, losses[:, :, [7, 2]])
    with pytest.raises(DataError, match="nobody"):
        truth.for_queries(["nobody"])


def test_damaged_truth_files(tmp_path):
    write_arrays(tmp_path / "t.safetensors", {"losses": np.zeros((1, 1, 1))}, {"n_train": 3})
    with pytest.raises(DataError, match="not a truth file"):
        Truth.load(tmp_path / "t.safetensors")
    with pytest.raises(DataError, match="shape"):
        Truth(np.zeros((2, 1, 1)), Groups.of([[0]], 3), ("q",))


def test_a_checkpoint_behind_the_truth_is_known_by_its_losses(plan, parts, tmp_path):
    """Also as a float16 copy under another name; another seed's model is another model."""
    import shutil

    from tdabench.targets import finetune
    from tdabench.targets.target import save_weights

    target, train, queries = parts
    build(plan, *parts, tmp_path / "work")
    truth = collect(plan, tmp_path / "work")
    shutil.copytree(target.folder, tmp_path / "target")
    for name, seed in (("same", plan.run_seed(Unit(1, 0))), ("other", 12345)):
        model = target.fresh_model("base")
        tokens = target.tokenize(train.subset(plan.groups[1]))
        finetune(model, tokens, plan.recipe, seed, target.pad_id)
        save_weights(model, tmp_path / "target" / f"{name}.safetensors")
    files = {n: f"{n}.safetensors" for n in ("base", "same", "other")}
    copy = Target("copy", tmp_path / "target", files, max_length=target.max_length)
    truth.check_apart(copy, ("base", "other"), queries)
    with pytest.raises(GuardError, match=r"'same' of copy .* losses of group 1, seed 0"):
        truth.check_apart(copy, ("other", "same"), queries)
    one = truth.for_queries(queries.ids[:1])
    with pytest.raises(GuardError, match="'same'"):
        one.check_apart(copy, ("same",), queries.subset([0]))
