"""The laws that every method keeps, each a function of one `Case`.

A law returns if it holds, raises `LawBroken` with the observation if it does not, and raises
`DoesNotApply` if it is not applicable. Scores are compared up to `Case.tolerance` times the largest
score, since batching and order change the last bits of a float.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.errors import MethodError, UsageError
from tdabench.groups import POOLINGS, Groups, pool_scores
from tdabench.io import canonical
from tdabench.method import Context, Index, TDAMethod
from tdabench.testing import watch
from tdabench.testing.tiny import TinyWorld, tiny_world


class LawBroken(AssertionError):
    """A method broke a law; the message states the observation and the remedy."""


class DoesNotApply(Exception):
    """A law is not applicable to this method, for the given reason."""


@dataclass(frozen=True)
class Law:
    """A law's name, as typed after `--law`, and its function."""

    name: str
    function: Callable[[Case], None]

    @property
    def doc(self) -> str:
        """The law's requirement: the first paragraph of the function's docstring."""
        return " ".join((self.function.__doc__ or "").split("\n\n")[0].split())

    def __call__(self, case: Case) -> None:
        self.function(case)


LAWS: dict[str, Law] = {}


def law(function: Callable[[Case], None]) -> Callable[[Case], None]:
    """Registers a law under its function's name with dashes."""
    name = function.__name__.replace("_", "-")
    LAWS[name] = Law(name, function)
    return function


class Case:
    """One method on the tiny world. Objects that several laws use are built once."""

    def __init__(self, method: TDAMethod, world: TinyWorld | None = None, tolerance: float = 1e-3):
        self.method = method
        self.world = world or tiny_world()
        self.tolerance = tolerance
        self.folder = Path(tempfile.mkdtemp(prefix="tdabench-case-"))

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------ making things

    def fresh(self) -> TDAMethod:
        """Returns another instance with the same parameters."""
        return type(self.method)(**self.method.params)

    def new_folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def context(self, seed: int = 0) -> Context:
        return self.world.context(self.new_folder("scratch"), seed)

    def build(self, train: Corpus | None = None, seed: int = 0) -> Index:
        """Builds a new index with a new instance and its own scratch folder."""
        return self.fresh().build(self.context(seed), self.train if train is None else train)

    @property
    def train(self) -> Corpus:
        return self.world.train

    @property
    def queries(self) -> Corpus:
        return self.world.queries

    @cached_property
    def groups(self) -> Groups:
        """Ten groups of 1 to 18 examples."""
        rng = np.random.default_rng(0)
        sizes = (1, 2, 3, 5, 8, 12, 18, 18, 18, 18)
        n = len(self.train)
        return Groups.of([rng.choice(n, s, replace=False) for s in sizes], n)

    @cached_property
    def index(self) -> Index:
        return self.build()

    @cached_property
    def scores(self) -> np.ndarray:
        """[query, train]."""
        return np.asarray(self.index.score(self.queries))

    @cached_property
    def group_scores(self) -> np.ndarray:
        """[query, group]."""
        return np.asarray(self.index.score_groups(self.queries, self.groups))

    # ------------------------------------------------------------------ judging

    def same(self, a: Any, b: Any, what: str, why: str, tolerance: float | None = None) -> None:
        """Breaks the law unless `a` equals `b` up to the tolerance."""
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        if a.shape != b.shape:
            raise LawBroken(f"{what}: shapes {list(a.shape)} and {list(b.shape)}. {why}")
        if a.size == 0:
            return
        limit = (self.tolerance if tolerance is None else tolerance) * max(
            float(np.abs(b).max()), 1e-30
        )
        off = np.abs(a - b)
        if not (off <= limit).all():
            raise LawBroken(
                f"{what}: {int((~(off <= limit)).sum())} of {off.size} scores differ by up to "
                f"{np.nanmax(off):.3g} where the largest is {np.abs(b).max():.3g}. {why}"
            )


# --------------------------------------------------------------------------- what it says it is


@law
def described(case: Case) -> None:
    """The class has a name, an integer version, a family and a one-line summary."""
    from tdabench.registry import NAME

    cls = type(case.method)
    if not NAME.fullmatch(cls.name):
        raise LawBroken(f"the name {cls.name!r} may contain only letters, digits, '.', '_', '-'")
    if not isinstance(cls.version, int) or isinstance(cls.version, bool) or cls.version < 1:
        raise LawBroken(f"version = {cls.version!r}: give an integer from 1, increased with scores")
    if not cls.summary.strip() or "\n" in cls.summary:
        raise LawBroken("summary is empty or longer than one line; `tdabench methods` prints it")
    if not cls.family.strip():
        raise LawBroken("family is empty; tables group methods by it")
    unknown = set(cls.expected_failures) - set(LAWS)
    if unknown:
        raise LawBroken(f"expected_failures names laws that do not exist: {sorted(unknown)}")
    if not all(str(reason).strip() for reason in cls.expected_failures.values()):
        raise LawBroken("expected_failures has a law without a reason")


@law
def import_is_light(case: Case) -> None:
    """Importing the plugin loads neither torch nor transformers, which would slow down help."""
    module = type(case.method).__module__
    code = (
        "import importlib, json, sys\n"
        "sys.path[:] = json.loads(sys.argv[1])\n"
        "try:\n    importlib.import_module(sys.argv[2])\n"
        "except ModuleNotFoundError as e:\n    print('no', e.name)\n    sys.exit()\n"
        "print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sys.path), module],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode or done.stdout.startswith("no "):
        raise DoesNotApply(f"{module} cannot be imported by that name in another process")
    if done.stdout.strip():
        raise LawBroken(
            f"importing {module} loads {' and '.join(done.stdout.split())}. Import them inside "
            "the functions that use them"
        )


@law
def construction_does_no_work(case: Case) -> None:
    """Constructing the method opens no file, draws no random number and takes no time.

    A method consists of its parameters: two instances with the same parameters are equal, and
    parameters cannot be changed.
    """
    from tdabench.run.meter import GlobalRandomness

    params = case.method.params
    random_state = GlobalRandomness()
    seconds = []
    with watch.file_events() as log:
        for _ in range(3):
            start = time.perf_counter()
            one = type(case.method)(**params)
            seconds.append(time.perf_counter() - start)
    opened = [p for what, p in log if not p.endswith((".py", ".pyc", ".so", ".pth"))]
    if opened:
        raise LawBroken(f"constructing it opened {opened[0]}. Move this work to build")
    if min(seconds) > 0.05:
        raise LawBroken(f"constructing it took {min(seconds):.2f} s. Move this work to build")
    try:
        random_state.check("constructing it")
    except MethodError as e:
        raise LawBroken(str(e)) from e
    if one != case.fresh():
        raise LawBroken("two instances with the same parameters differ: use a plain dataclass")
    try:
        hash(one)
    except TypeError as e:
        raise LawBroken(f"{e}: a parameter must be immutable (a tuple, not a list)") from e
    try:
        one.name = "other"  # type: ignore[misc]
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise LawBroken("its parameters can be changed: decorate it with @dataclass(frozen=True)")


@law
def parameters_are_checked(case: Case) -> None:
    """Every parameter has a default and survives JSON; unknown names and wrong types are refused.

    `tdabench run --methods NAME` constructs the method without parameters, and its record
    stores them.
    """
    cls = type(case.method)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    none = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if none:
        raise LawBroken(f"the parameter {none[0]!r} has no default")
    try:
        cls.from_params({"no_such_parameter": 1})
    except UsageError:
        pass
    else:
        raise LawBroken("it accepts an unknown parameter")
    for f in fields:
        if isinstance(f.default, (int, float)):
            try:
                cls.from_params({f.name: "not a number"})
            except UsageError:
                continue
            raise LawBroken(f"it accepts the text 'not a number' for {f.name}")
    try:
        spelled = json.loads(canonical(case.method.params))
    except (TypeError, ValueError) as e:
        raise LawBroken(f"its parameters cannot be written as JSON: {e}") from e
    if cls.from_params(spelled) != case.method:
        raise LawBroken("its parameters do not survive being written as JSON and read back")


# --------------------------------------------------------------------------- what it returns


@law
def shapes_and_finiteness(case: Case) -> None:
    """Scores are finite floats [query, train] and [query, group], also for zero or one query."""
    from tdabench.run.meter import checked

    name, index, n = type(case.method).name, case.index, len(case.train)
    if index.n_train != n:
        raise LawBroken(f"n_train is {index.n_train} after building on {n} examples")
    extremes = Groups.of([range(n), [0]], n)
    try:
        for queries in (case.queries, case.queries[:1], case.queries[:0]):
            checked(name, "score", index.score(queries), (len(queries), n))
            for groups in (case.groups, extremes, extremes[:0]):
                scores = index.score_groups(queries, groups)
                checked(name, "score_groups", scores, (len(queries), len(groups)))
    except MethodError as e:
        raise LawBroken(str(e)) from e


@law
def top_k_agrees_with_score(case: Case) -> None:
    """top_k returns the k largest scores in order with their indices, or all if there are fewer."""
    n = len(case.train)
    for k in (1, 5, n, n + 3):
        values, ids = case.index.top_k(case.queries, k)
        shape = (len(case.queries), min(k, n))
        if np.shape(values) != shape or np.shape(ids) != shape:
            raise LawBroken(f"top_k of {k} returned {np.shape(values)} and {np.shape(ids)}")
        if any(len(set(row)) < len(row) for row in np.asarray(ids).tolist()):
            raise LawBroken(f"top_k of {k} returned an example twice")
        own = np.take_along_axis(case.scores, np.asarray(ids), axis=1)
        case.same(values, own, "top_k compared with score at its indices", "They must agree.")
        best = -np.sort(-case.scores, axis=1)[:, : shape[1]]
        case.same(values, best, "top_k compared with the best scores", "They must agree, in order.")


@law
def some_scores_agree_with_score(case: Case) -> None:
    """score_some returns the scores of the requested examples of each query, in their order."""
    rng = np.random.default_rng(2)
    n = len(case.train)
    for k in (1, 5, n):
        chosen = np.stack([rng.permutation(n)[:k] for _ in case.queries])
        some = case.index.score_some(case.queries, chosen)
        if np.shape(some) != chosen.shape:
            raise LawBroken(f"score_some of {chosen.shape} returned the shape {np.shape(some)}")
        own = np.take_along_axis(case.scores, chosen, axis=1)
        case.same(some, own, "score_some compared with score at its indices", "They must agree.")


# --------------------------------------------------------------------------- what must not matter


@law
def batches_do_not_matter(case: Case) -> None:
    """Queries scored one at a time get the same scores as together.

    Unmasked padding, a model's mean loss over the batch and statistics of the batch break this law.
    """
    alone = np.vstack([case.index.score([q]) for q in case.queries])
    why = "Mask padding, and sum per-example losses instead of averaging over the batch."
    case.same(alone, case.scores, "one query at a time compared with all together", why)


@law
def query_order_does_not_matter(case: Case) -> None:
    """Queries in another order get the same scores."""
    order = np.random.default_rng(1).permutation(len(case.queries))
    shuffled = case.index.score(case.queries.subset(order))
    why = "Return results in the order of the input, even after sorting by length."
    case.same(shuffled, case.scores[order], "queries in another order", why)


@law
def corpus_order_does_not_matter(case: Case) -> None:
    """Permuting the training corpus permutes the scores."""
    order = np.random.default_rng(2).permutation(len(case.train))
    shuffled = case.build(case.train.subset(order)).score(case.queries)
    why = "Random draws must depend on names and ids, not on positions."
    case.same(shuffled, case.scores[:, order], "a permuted corpus", why)


@law
def order_in_a_group_does_not_matter(case: Case) -> None:
    """A group's score depends on its members and not on their positions in the corpus."""
    n = len(case.train)
    order = np.random.default_rng(3).permutation(n)
    place = np.argsort(order)  # example i of the corpus is at place[i] of the permuted corpus
    groups = Groups.of([place[g] for g in case.groups], n)
    shuffled = case.build(case.train.subset(order)).score_groups(case.queries, groups)
    why = "score_groups must treat all members alike."
    case.same(shuffled, case.group_scores, "the same groups of a permuted corpus", why)
    back = case.index.score_groups(case.queries, case.groups[::-1])
    case.same(back[:, ::-1], case.group_scores, "the groups in another order", why)


@law
def labels_do_not_matter(case: Case) -> None:
    """Scores do not depend on task labels and further fields, unless `reads_labels` is True.

    A run gives them to no other method, so that a method that reads them scores worse there.
    """
    if type(case.method).reads_labels:
        raise DoesNotApply("it declares reads_labels = True")
    others: dict[str, tuple[str, dict[str, str]]] = {
        "withheld": ("", {}),
        "replaced": ("another", {"fact": "another"}),
    }
    for what, (task, meta) in others.items():
        train, queries = (
            Corpus([dataclasses.replace(e, task=task, meta=meta) for e in corpus], corpus.name)
            for corpus in (case.train, case.queries)
        )
        why = "Score by prompt and response only, or declare reads_labels = True."
        case.same(case.build(train).score(queries), case.scores, f"labels {what}", why)


# --------------------------------------------------------------------------- groups


@law
def group_of_one_equals_score(case: Case) -> None:
    """The score of a group of one example is that example's score."""
    single = case.index.score_groups(case.queries, Groups.singletons(len(case.train)))
    case.same(single, case.scores, "groups of one compared with score", "They must be equal.")


@law
def groups_follow_the_declared_pooling(case: Case) -> None:
    """Group scores are the pooling of example scores that the index declares.

    An index that overrides score_groups with something else sets `pooling = "own"`.
    """
    pooling = case.index.pooling
    if pooling == "own":
        raise DoesNotApply("it declares its own group scores")
    if pooling not in POOLINGS:
        raise LawBroken(f"pooling is {pooling!r}: one of {', '.join(POOLINGS)}, or 'own'")
    pooled = pool_scores(case.scores, case.groups, pooling, case.index.temperature)
    why = "Set pooling = 'own' on an index whose group scores are not a pooling of example scores."
    case.same(case.group_scores, pooled, f"score_groups compared with the {pooling} of score", why)


# --------------------------------------------------------------------------- the same every time


@law
def same_seed_same_scores(case: Case) -> None:
    """Two builds with one seed give the same scores, for any state of the global generators."""
    found = []
    for seed in (1, 2):
        with watch.global_seeds(seed):
            found.append(case.build().score(case.queries))
    why = "Draw from context.rng(name) or context.torch_generator(name)."
    case.same(found[0], found[1], "two builds with the same seed", why, tolerance=1e-5)


@law
def second_call_equals_the_first(case: Case) -> None:
    """Scoring twice gives the same scores: a call does not change the index."""
    index = case.build()
    first = np.array(index.score(case.queries))
    groups = np.array(index.score_groups(case.queries, case.groups))
    why = "Something is changed in place (such as a damping added twice); work on copies."
    case.same(index.score(case.queries), first, "a second call of score", why, 1e-5)
    again = index.score_groups(case.queries, case.groups)
    case.same(again, groups, "a second call of score_groups", why, 1e-5)


@law
def save_and_load_round_trip(case: Case) -> None:
    """A loaded index gives the scores of the saved one, even without the scratch folder.

    Saved files contain no pickle, so that reading an untrusted index runs no code.
    """
    context = case.context()
    index = case.fresh().build(context, case.train)
    folder = case.new_folder("index")
    index.save(folder)
    pickles = [p.name for p in sorted(folder.rglob("*")) if p.is_file() and _is_pickle(p)]
    if pickles:
        raise LawBroken(f"{pickles[0]} is a pickle. Save with write_arrays and write_json")
    del index
    shutil.rmtree(context.scratch, ignore_errors=True)
    loaded = case.fresh().load(case.context(), folder)
    if loaded.n_train != len(case.train):
        raise LawBroken(f"the loaded index has n_train {loaded.n_train}, not {len(case.train)}")
    why = "Save everything that scoring needs, and nothing in the scratch folder."
    case.same(loaded.score(case.queries), case.scores, "score after load", why)
    scores = loaded.score_groups(case.queries, case.groups)
    case.same(scores, case.group_scores, "score_groups after load", why)


@law
def query_time_parameters_leave_the_index(case: Case) -> None:
    """An index serves every value of the parameters in `query_time` like one built with it."""
    cls = type(case.method)
    strange = sorted(set(cls.query_time) - set(case.method.params))
    if strange:
        raise LawBroken(f"`query_time` names {strange[0]}, which is not a parameter")
    folder = case.new_folder("index")
    case.index.save(folder)
    for name in cls.query_time:
        now = case.method.params[name]
        for value in [v for v in cls.grid.get(name, ()) if v != now][:1]:
            other = cls(**case.method.params | {name: value})
            got = other.load(case.context(), folder).score(case.queries)
            want = other.build(case.context(), case.train).score(case.queries)
            why = "Remove parameters from `query_time` that the index depends on."
            case.same(got, want, f"{name}={value} on an index built with {now}", why)


def _is_pickle(path: Path) -> bool:
    """Detects a pickle of protocol 2 and above by content, or an archive that contains one."""
    import zipfile

    with open(path, "rb") as f:
        start = f.read(4096)
    if start[8:10] == b'{"':  # safetensors: eight bytes of length, which may look like a pickle
        return False
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if start[:6] == b"\x93NUMPY":
        return b"|O" in start
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            return any(n.endswith(".pkl") for n in z.namelist())
    return path.suffix in (".pkl", ".pickle")


# --------------------------------------------------------------------------- what it leaves alone


def _use(case: Case, context: Context) -> None:
    """Makes every call that a benchmark may make."""
    index = case.fresh().build(context, case.train)
    index.warm_up(case.queries[:1])
    index.score(case.queries)
    index.score_groups(case.queries, case.groups)
    index.top_k(case.queries, 3)
    index.score_some(case.queries, np.zeros((len(case.queries), 1), dtype=np.int64))


@law
def model_is_untouched(case: Case) -> None:
    """The target's models keep weights, mode, gradient flags and hooks, and hold no gradients."""
    from tdabench.run.meter import model_state

    context = case.context()
    models = {c: context.target.model(c) for c in context.target.checkpoints}
    before = {c: model_state(m) for c, m in models.items()}
    _use(case, context)
    for checkpoint, model in models.items():
        after = model_state(model)
        for what, value in before[checkpoint].items():
            if after[what] != value:
                raise LawBroken(
                    f"the model {checkpoint!r} was left with {what} changed. Restore it, or work "
                    "on target.fresh_model()"
                )
        if any(p.grad is not None for p in model.parameters()):
            raise LawBroken(f"gradients were left in the model {checkpoint!r}")


@law
def globals_are_untouched(case: Case) -> None:
    """Global random generators, environment, working directory and torch's settings are kept."""
    from tdabench.run.meter import GlobalRandomness

    random_state, before = GlobalRandomness(), watch.process_state()
    try:
        _use(case, case.context())
        after = watch.process_state()
        changed = [k for k in before if before[k] != after[k]]
        if changed:
            raise LawBroken(f"it changed {' and '.join(changed)}")
        try:
            random_state.check("it")
        except MethodError as e:
            raise LawBroken(str(e)) from e
    finally:
        _restore(before)


def _restore(before: dict[str, Any]) -> None:
    """Restores the state that an offender changed, so that every law starts from the same state."""
    import torch

    os.chdir(before["the working directory"])
    if dict(os.environ) != before["environment variables"]:
        os.environ.clear()
        os.environ.update(before["environment variables"])
    torch.set_default_dtype(before["torch's default dtype"])
    torch.set_grad_enabled(before["torch's gradient mode"])
    torch.set_num_threads(before["torch's number of threads"])
    np.seterr(**before["numpy's error handling"])


@law
def writes_only_in_scratch(case: Case) -> None:
    """Files are written only to the scratch and save folders; there are no connections."""
    context, folder = case.context(), case.new_folder("index")
    with watch.file_events() as log:
        index = case.fresh().build(context, case.train)
        index.score(case.queries)
        index.save(folder)
    strays = watch.outside(log, context.scratch, folder)
    if strays:
        raise LawBroken(f"it wrote or connected to {strays[0]}. Write only in context.scratch")


@law
def prints_nothing(case: Case) -> None:
    """Nothing is printed: stdout is data. Progress goes to context.progress."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        _use(case, case.context())
    if out.getvalue():
        raise LawBroken(f"it printed {out.getvalue()[:60]!r}. Use context.progress")


@law
def leaves_nothing_running(case: Case) -> None:
    """No thread or process that building or scoring started is running afterwards.

    A run kills such a process and names it in the row; a thread stands still until the next call.
    """
    with watch.left_running() as left:
        context = case.context()
        index = case.fresh().build(context, case.train)
        after_build = left()
        index.score(case.queries)
        index.score_groups(case.queries, case.groups)
        after_score = left()
    for phase, found in (("build", after_build), ("scoring", after_score)):
        if found:
            raise LawBroken(
                f"{phase} left running: {found[0]}. Wait for what you start before you return"
            )


@law
def works_confined(case: Case) -> None:
    """Building, saving, loading and scoring work in the sandbox of a run, with the same scores.

    Building and loading happen in two processes, which read libraries, the target, assets and the
    corpus, and write their own folders. Skipped where the system has no sandbox.
    """
    from tdabench.run import sandbox
    from tdabench.testing.confined import NOT_FOUND, run_confined

    cls = type(case.method)
    where = f"{cls.__module__}.{cls.__qualname__}"
    if not sandbox.abi():
        raise DoesNotApply("this system has no Landlock (Linux 5.13 or later) to confine methods")
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise DoesNotApply(f"{where} cannot be imported by that name in another process")
    wanted = case.scores, case.group_scores
    found = run_confined(case.method, case.world, case.groups, case.new_folder("confined"))
    if found.get("kind") == NOT_FOUND:
        raise DoesNotApply(f"{where} cannot be imported by that name in another process")
    if "error" in found:
        raised = f"raised {found['kind']}: " if found["kind"] else "failed: "
        raise LawBroken(
            f"confined, {found['doing']} {raised}{found['error']}. Read what the method is given, "
            "and write in context.scratch"
        )
    why = "A refused access may have been ignored."
    case.same(found["scores"], wanted[0], "score in the sandbox", why)
    case.same(found["group_scores"], wanted[1], "score_groups in the sandbox", why)


# --------------------------------------------------------------------------- what scores mean


@law
def a_copy_outranks_others(case: Case) -> None:
    """A training example that equals the query scores above most others.

    Every training example is used as a query under a new id: on average at least four fifths of the
    others must score lower (ties count half). A method that ignores the query cannot keep this law;
    a score of the wrong sign breaks it.
    """
    copies: Sequence[Example] = [dataclasses.replace(e, id=f"copy-of-{e.id}") for e in case.train]
    scores = case.index.score(copies)  # [train, train]
    own = np.diag(scores)[:, None]
    below = (scores < own).sum(1) + 0.5 * ((scores == own).sum(1) - 1)
    share = float((below / (scores.shape[1] - 1)).mean())
    if share < 0.8:
        raise LawBroken(
            f"a copy of the query outranks {share:.0%} of the others on average, expected 80%. "
            "Positive must mean helpful"
        )
