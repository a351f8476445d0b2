"""On an NVIDIA GPU: the scores of the CPU, real memory running out, retraining, the command line.

Skipped where torch sees no GPU. `python -m pytest tests/test_cuda.py` on a machine that has one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tdabench.errors import MissingAsset, MissingExtra
from tdabench.registry import Registry
from tdabench.testing.tiny import TinyWorld, tiny_suite, tiny_world
from tdabench.toolkit.gradients import GradientEngine, map_batches

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

AIRREP = {"airrep": ROOT / "tests/fixtures/airrep/checkpoint"}
# Differentiates through a training run, where rounding grows; closed forms are in its own tests.
CHAOTIC = ("magic",)
# Packages that draw their projections on the device: other numbers there, by design.
OWN_NUMBERS = ("dattri-trak", "traker")
# A label that is drawn from the model flips when its probability is rounded another way.
SETTINGS = {"kfac": {"fisher": "empirical"}, "ekfac": {"fisher": "empirical"}}
METHODS = [name for name in Registry().methods if name not in CHAOTIC]


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> None:
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), np.linalg.norm(
        a - b
    ) / np.linalg.norm(b)


def features(world: TinyWorld, device: str, dtype: str = "float32", **engine) -> np.ndarray:
    target = replace(world.target, dtype=dtype)
    made = GradientEngine(
        target.model("warm", device), random=world.context(Path()).torch_generator, **engine
    )
    out = np.full((len(world.train), made.dim), np.nan, np.float32)
    for batch in target.batches(target.tokenize(world.train), 256):
        out[batch.index] = made.gradients(batch.to(device)).cpu().numpy()
    return out


@pytest.mark.parametrize("engine", [{}, {"bias": True}, {"rank": 4}, {"rank": 4, "bias": True}])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "gpt_neox"])
def test_gradients_are_those_of_the_cpu(architecture: str, engine: dict) -> None:
    world = tiny_world(architecture)
    close(features(world, "cuda", **engine), features(world, "cpu", **engine), 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_in_half_precision_are_near(dtype: str) -> None:
    world = tiny_world()
    want, got = features(world, "cpu"), features(world, "cuda", dtype)
    close(got, want, 0.05)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        world = replace(tiny_world(), assets=AIRREP)
        context = replace(world.context(tmp_path / device), device=device)
        context.scratch.mkdir()
        try:
            method = Registry().method(name).cls(**SETTINGS.get(name, {}))
            index = method.build(context, world.train)
            scores = index.score(world.queries)
        except (MissingExtra, MissingAsset) as e:
            pytest.skip(str(e))
        index.save(tmp_path / f"{device}-saved")
        again = method.load(context, tmp_path / f"{device}-saved").score(world.queries)
        close(again, scores, 1e-5)
        found.append(np.asarray(scores, dtype=np.float64))
    if name not in OWN_NUMBERS:
        close(found[1], found[0], 2e-3)


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path) -> None:
    world = tiny_world()
    told: list[str] = []
    context = replace(
        world.context(tmp_path), device="cuda", progress=lambda what, done, n: told.append(what)
    )
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(2**30 / total)  # one GiB
    try:

        def greedy(batch):  # type: ignore[no-untyped-def]
            return torch.ones(len(batch.index), 2**25, device="cuda").sum(1)  # 128 MiB an example

        tokens = world.target.tokenize(world.train)
        found = {int(i) for index, _ in map_batches(context, tokens, greedy) for i in index}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == set(range(len(world.train)))
    assert any("halved" in line for line in told)


def test_retraining_loses_what_it_loses_on_the_cpu(tmp_path: Path) -> None:
    from tdabench.groups import Groups
    from tdabench.targets import Recipe
    from tdabench.truth import InProcess, Pool, Stacked, TruthPlan, build, collect

    world = tiny_world()
    parts = world.target, world.train, world.queries
    groups = Groups.of([range(10), range(7, 17), range(20, 30), range(25, 36)], 36)
    recipe = Recipe(lr=1e-3, epochs=1, batch_size=8)
    plan = TruthPlan.of("cuda", *parts, groups=groups, n_seeds=1, recipe=recipe)
    engines = {
        "cpu": InProcess("cpu"),
        "gpu": InProcess("cuda"),
        "stack": Stacked(4, "cuda"),
        "pool": Pool(2, ("cuda:0",)),
    }
    losses = {}
    for name, engine in engines.items():
        assert build(plan, *parts, tmp_path / name, engine=engine) == []
        losses[name] = collect(plan, tmp_path / name).losses
    for name in ("gpu", "stack", "pool"):
        np.testing.assert_allclose(losses[name], losses["cpu"], atol=1e-3)


def test_the_command_line_takes_the_gpu_by_itself(tmp_path: Path) -> None:
    suite = tiny_suite(tmp_path / "suite")
    command = [
        sys.executable, "-m", "tdabench", "run", "--suite", str(suite), "--out",
        str(tmp_path / "run"), "--methods", "trak,logra,ekfac,hidden,tfidf", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert {c["status"] for c in cells} == {"ok"}
    records = [json.loads(p.read_text()) for p in (tmp_path / "run/cells").glob("*.json")]
    for record in records:
        assert record["hardware"]["gpu"] == torch.cuda.get_device_name()
        used = record["cost"]["build"].get("gpu_peak_bytes", 0)
        assert (used > 0) == (record["method"]["name"] != "tfidf")


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tdabench", "run", "--suite", "pocket", "--methods", "hidden",
        "--device", "cuda:63", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "cuda:63" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
