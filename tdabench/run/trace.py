"""Tracing: the training examples that help and harm a model output most, by several methods.

An index comes from a run of the suite if there is one, or is built once and kept in the cache. It
is read from disk block by block: neither corpus nor scores have to fit in memory.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.behaviours import Behaviour, parts_of
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, MethodError, TdabenchError, brief
from tdabench.groups import Groups
from tdabench.io import cache_folder, fingerprint, remove
from tdabench.method import Context, Index
from tdabench.registry import registry
from tdabench.rows import dots, is_sparse, row_blocks, top_k_of
from tdabench.run.contestants import Contestants, checked, lives_apart
from tdabench.run.execute import set_by
from tdabench.run.folder import keep_index, kept_index, new_index
from tdabench.run.inputs import Inputs
from tdabench.run.judge import RemoteIndex
from tdabench.run.plan import Job, MethodSpec, Plan
from tdabench.run.suite import SuiteTarget
from tdabench.targets.target import Target
from tdabench.toolkit.pipeline import PipelineIndex
from tdabench.toolkit.representation import RepresentationIndex

Say = Callable[[str], None]
Query = Example | Behaviour  # what is explained: the loss of one example, or of several


@dataclass(frozen=True)
class Traced:
    """One method's answer for every query, or the `reason` for its absence.

    The arrays are [query, k], extremes first: positions in the training corpus, and scores.
    """

    label: str
    index_seconds: float = 0.0  # seconds of building, or 0 if the index existed
    query_seconds: float = 0.0
    top: np.ndarray | None = None
    top_score: np.ndarray | None = None
    bottom: np.ndarray | None = None
    bottom_score: np.ndarray | None = None
    reason: str = ""
    totals: np.ndarray | None = None  # [query, 2]: sums of all positive and all negative scores
    by_source: np.ndarray | None = None  # [query, source]: group scores, if sources were asked for
    words: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # by (query, index)
    query_words: dict[int, np.ndarray] = field(default_factory=dict)  # by query


def trace(
    plan: Plan,
    queries: Sequence[Query],
    k: int,
    runs: Sequence[Path] = (),
    say: Say = lambda message: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    sources: Groups | None = None,
    words: int = 0,
    contestants: Contestants | None = None,
) -> Iterator[Traced]:
    """Returns one answer per method of `plan`, in its order.

    With `sources`, groups of training examples, an answer has their group scores as well; with
    `words`, the word scores of so many helpful examples, and the query's word scores for all of
    their scores, where the method has any. `runs` are run folders whose indices can be used. A
    method that fails gives an answer with its reason, and the others continue. Third-party
    methods that this process must not import run in `contestants`.
    """
    done: set[str] = set()
    for job in plan.builds:  # one of each label, and of each index
        if {job.method.label, job.index_key} & done:
            continue
        done |= {job.method.label, job.index_key}
        try:
            with tempfile.TemporaryDirectory(prefix="tdabench-trace-") as scratch:
                opened = _open(plan, job, runs, say, progress, Path(scratch), contestants)
                yield _traced(plan, job, *opened, queries, k, sources, words)
        except TdabenchError as e:
            yield Traced(job.method.label, reason=str(e))
        except Exception as e:  # a plugin may raise anything
            yield Traced(job.method.label, reason=brief(e))
        finally:
            if contestants is not None:
                contestants.release()


def _traced(
    plan: Plan,
    job: Job,
    index: Index,
    spent: float,
    queries: Sequence[Query],
    k: int,
    sources: Groups | None,
    words: int,
) -> Traced:
    start = time.perf_counter()
    found, totals = with_totals(index, queries, k)
    summed = None
    if sources is not None:
        summed = np.concatenate([scores_of(index, [q], sources) for q in queries])
        if not np.isfinite(summed).all():
            raise MethodError("NaN or infinite group scores")
    told: dict[tuple[int, int], np.ndarray] = {}
    asked: dict[int, np.ndarray] = {}
    for q, query in enumerate(queries if words else ()):
        shown = [int(i) for i, s in zip(found[0][q], found[1][q]) if s > 0][:words]
        of_each = index.score_words(as_behaviour(query), [plan.suite.train[i] for i in shown])
        for i, scores in zip(shown, of_each or ()):
            told[q, i] = scores
        of_query = index.score_query_words(as_behaviour(query), shown)
        if of_query is not None:
            asked[q] = of_query
    seconds = time.perf_counter() - start
    return Traced(
        job.method.label, spent, seconds, *found, totals=totals, by_source=summed,
        words=told, query_words=asked,
    )  # fmt: skip


def _open(
    plan: Plan,
    job: Job,
    runs: Sequence[Path],
    say: Say,
    progress: Callable[[str, int, int], None],
    scratch: Path,
    contestants: Contestants | None,
) -> tuple[Index, float]:
    """Returns the index of a method or a pipeline, and the seconds of building what was missing."""
    specs = list(zip(job.method.stages or (job.method,), job.kept_keys, strict=True))
    opened = [
        open_index(plan, job, spec, key, runs, say, progress, scratch / str(i), contestants)
        for i, (spec, key) in enumerate(specs)
    ]
    index, spent = opened[0][0], sum(seconds for _, seconds in opened)
    if job.method.stages:
        # `rest` applies to runs only: a person sees only examples that the last stage scored.
        index = PipelineIndex([i for i, _ in opened], job.method.params["keep"], "zero")
    if any(isinstance(i, RemoteIndex) for i, _ in opened):
        index = checked(index, job.method.label)
    return index, spent


def open_index(
    plan: Plan,
    job: Job,
    spec: MethodSpec,
    key: str,
    runs: Sequence[Path],
    say: Say,
    progress: Callable[[str, int, int], None],
    scratch: Path,
    contestants: Contestants | None = None,
) -> tuple[Index, float]:
    """Returns the index of a method, or of a stage of a pipeline, and the seconds of building it.

    `key` names the index on disk; 0 seconds if it was there.
    """
    suite = plan.suite

    def tell() -> None:
        examples = f"{len(suite.train):,} examples"
        say(f"{spec.label}: building its index on {examples} (kept for later)")

    if contestants is not None and lives_apart(spec.name):
        return contestants.index(
            spec.name, spec.params, set_by(spec), key, suite, job.target, seed=job.seed,
            device=plan.request.device, places=runs, on_build=tell,
        )  # fmt: skip
    scratch.mkdir(parents=True, exist_ok=True)
    assets = Inputs(suite, suite.assets_for(job.target), "asset")
    context = Context(
        target=job.target.target,
        scratch=scratch,
        seed=job.seed,
        device=plan.request.device,
        assets=assets,
        progress=progress,
    )
    method = registry().method(spec.name).cls.from_params(spec.params)
    kept = cache_folder() / "indices"
    start, spent = time.perf_counter(), 0.0
    places = [*(run / "indices" for run in runs), kept]
    folder = next((p / key for p in places if _serves(p, key, assets)), None)
    if folder is None:
        tell()
        build(method, context, suite.train, kept, key, assets)
        folder, spent = kept / key, time.perf_counter() - start
    return method.load(context, folder / "index"), spent


def _serves(indices: Path, key: str, assets: Inputs) -> bool:
    """Tells whether an unchanged index exists, built with the present assets."""
    built = kept_index(indices, key)
    try:
        used = dict(built["assets"]) if built else {}
    except (KeyError, TypeError, ValueError):
        return False
    return built is not None and all(assets.content(k) == v for k, v in used.items())


def build(
    method: Any, context: Context, train: Corpus, indices: Path, key: str, assets: Inputs
) -> None:
    """Builds the index of `key` in the folder `indices`, completely or not at all."""
    start = time.perf_counter()
    index = method.build(context, train)
    if not isinstance(index, Index) or getattr(index, "n_train", None) != len(train):
        raise MethodError(f"{method.name} did not build an index of the {len(train)} examples")
    temporary = new_index(indices, key)
    try:
        index.save(temporary / "index")
        cost = {"seconds": round(time.perf_counter() - start, 3), "n_train": len(train)}
        keep_index(temporary, indices, key, {"cost": cost, "assets": dict(assets.used)})
    finally:
        remove(temporary)


Extremes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def extremes(index: Index, queries: Sequence[Query], k: int) -> Extremes:
    """Returns positions and scores of the k highest, then k lowest: each [query, k], extreme first.

    Equal scores are ordered by position. An index of representations is read once, block by block.
    """
    return with_totals(index, queries, k)[0]


def with_totals(index: Index, queries: Sequence[Query], k: int) -> tuple[Extremes, np.ndarray]:
    """Returns `extremes`, and the sums of all positive and of all negative scores [query, 2]."""
    k = min(k, int(index.n_train))
    plain = isinstance(index, RepresentationIndex) and (
        type(index).score is RepresentationIndex.score
        and type(index).score_behaviours is Index.score_behaviours
    )
    if plain:
        examples, weights = parts_of([as_behaviour(q) for q in queries])
        q = index.query_features(examples)  # type: ignore[attr-defined]
        # A sum of products is the product of the sum: every row is read once, for all behaviours.
        if len(examples) != len(queries) or (weights != np.eye(len(queries))).any():
            q = _sparse(weights) @ q if is_sparse(q) else weights @ np.asarray(q, np.float32)
        rows = index.rows  # type: ignore[attr-defined]
        return _best(((a, dots(q, block)) for a, block in row_blocks(rows)), len(queries), k)
    # One query at a time: such a method has to hold a row of scores anyway.
    parts = [_best([(0, scores_of(index, [e]))], 1, k) for e in queries]
    top, top_score, low, low_score = (np.concatenate(side) for side in zip(*(p[0] for p in parts)))
    return (top, top_score, low, low_score), np.concatenate([p[1] for p in parts])


def _sparse(weights: np.ndarray) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix(weights)


def as_behaviour(query: Query) -> Behaviour:
    return query if isinstance(query, Behaviour) else Behaviour(query.id, (query,), (1.0,))


def scores_of(index: Index, queries: Sequence[Query], groups: Groups | None = None) -> np.ndarray:
    """Returns scores of queries or behaviours on examples, [query, train], or on groups."""
    plain = [q for q in queries if not isinstance(q, Behaviour)]
    if len(plain) < len(queries):
        return index.score_behaviours([as_behaviour(q) for q in queries], groups)
    return index.score(plain) if groups is None else index.score_groups(plain, groups)


def _best(blocks: Iterable[tuple[int, np.ndarray]], n: int, k: int) -> tuple[Extremes, np.ndarray]:
    """Returns the same from (first position, scores [n, block]) of every block."""
    totals = np.zeros((n, 2))
    kept = {sign: (np.empty((n, 0), np.float32), np.empty((n, 0), np.int64)) for sign in (1, -1)}
    for a, scores in blocks:
        if not np.isfinite(scores).all():
            raise MethodError("NaN or infinite scores")
        for side, clipped in enumerate((np.maximum(scores, 0), np.minimum(scores, 0))):
            totals[:, side] += clipped.sum(axis=1, dtype=np.float64)
        for sign, (values, ids) in kept.items():
            more, places = top_k_of(sign * scores, k, offset=a)
            values, ids = np.hstack([values, more]), np.hstack([ids, places])
            values, order = top_k_of(values, k)
            kept[sign] = values, np.take_along_axis(ids, order, axis=1)
    return (kept[1][1], kept[1][0], kept[-1][1], -kept[-1][0]), totals


def retrained(target: SuiteTarget, train: Corpus, device: str = "cpu", say: Say = print) -> Target:
    """Returns the target with a checkpoint `retrained`: its base, trained on all of `train`.

    Follows the target's recipe with seed 0. The weights (float16) are kept in the cache.
    """
    from tdabench.targets.target import save_weights
    from tdabench.targets.training import finetune

    model, recipe = target.target, target.target.recipe
    about = [model.fingerprint_of("base"), recipe.as_dict(), train.fingerprint, device]
    path = (cache_folder() / "retrained" / f"{fingerprint(about)}.safetensors").absolute()
    if not path.exists():
        say(f"training {model.name} (base) on {len(train):,} examples, once")
        start = last = time.monotonic()

        def on_step(done: int, total: int, loss: float) -> None:
            nonlocal last
            if (now := time.monotonic()) - last > 10:
                last = now
                left = (total - done) * (now - start) / done
                say(f"training: {done:,} of {total:,} steps, about {left:.0f} s left")

        fresh = model.fresh_model("base").to(device)  # type: ignore[arg-type]
        finetune(fresh, model.tokenize(train), recipe, 0, model.pad_id, on_step)
        save_weights(fresh, path)
    return replace(model, checkpoints={**model.checkpoints, "retrained": str(path)})


def answer(
    target: Target, prompt: str, checkpoint: str, device: str = "cpu", max_tokens: int = 48
) -> str:
    """Generates the target's greedy answer to a prompt at a checkpoint."""
    import torch

    model = target.model(checkpoint, device)
    (tokens,) = target.tokenize([Example("prompt", prompt, "")], role="prompt")
    room = min(max_tokens, target.max_length - len(tokens) - 1)
    if room < 1:
        raise DataError(
            f"the prompt has {len(tokens)} tokens of the {target.max_length} that "
            f"{target.name} reads: no room is left for an answer",
            "Give one with --response",
        )
    ids = torch.from_numpy(tokens.ids)[None].to(model.device)
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            pad_token_id=target.pad_id,
        )
    text = target.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()
