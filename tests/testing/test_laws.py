"""Every law catches its planted offender, and the method it was planted in keeps them all."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from zlib import crc32

import numpy as np
import pytest

from tdabench.api import (
    Context,
    Index,
    MissingExtra,
    RepresentationIndex,
    RepresentationMethod,
    UsageError,
    write_arrays,
)
from tdabench.groups import pool_scores
from tdabench.run import sandbox
from tdabench.testing import LAWS, Case, check_law, check_method, parametrize_with_laws


@dataclass(frozen=True, kw_only=True)
class Honest(RepresentationMethod):
    """Word counts in hashed buckets, normalised: keeps every law."""

    name = "honest"
    family = "text"
    summary = "hashed word counts"

    width: int = 256

    def encode(self, context, examples, role):
        rows = np.zeros((len(examples), self.width), dtype=np.float32)
        for row, e in zip(rows, examples):
            for word in e.text.split():
                row[crc32(word.encode()) % self.width] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


class Wrapped(RepresentationIndex):
    """An honest index that an offender overrides a part of."""

    @classmethod
    def of(cls, index):
        return cls(index.method, index.context, index.rows, index.state)


def with_index(wrapped):
    """A method class whose index is `wrapped`, loaded ones too."""

    @dataclass(frozen=True, kw_only=True)
    class Method(Honest):
        def build(self, context, train):
            return wrapped.of(super().build(context, train))

        def load(self, context, path):
            return wrapped.of(super().load(context, path))

    return Method


def offenders() -> dict[str, type]:
    """One broken method a law."""
    found: dict[str, type] = {}

    @dataclass(frozen=True, kw_only=True)
    class NoSummary(Honest):
        summary = ""

    found["described"] = NoSummary

    @dataclass(frozen=True, kw_only=True)
    class Busy(Honest):
        def __post_init__(self):
            super().__post_init__()
            time.sleep(0.06)

    found["construction-does-no-work"] = Busy

    @dataclass(frozen=True, kw_only=True)
    class Lenient(Honest):
        @classmethod
        def from_params(cls, params):
            known = {f.name for f in dataclasses.fields(cls)}
            return super().from_params({k: v for k, v in params.items() if k in known})

    found["parameters-are-checked"] = Lenient

    class Nan(Wrapped):
        def score(self, queries):
            s = super().score(queries)
            s[:1, 3] = np.nan
            return s

    found["shapes-and-finiteness"] = with_index(Nan)

    @dataclass(frozen=True, kw_only=True)
    class Late(Honest):
        grid: ClassVar = {"width": (256, 64)}
        query_time: ClassVar = ("width",)  # an index of 256 columns answers with 64?

        def encode(self, context, examples, role):
            rows = super().encode(context, examples, role)
            return np.pad(rows, ((0, 0), (0, 256 - self.width)))

    found["query-time-parameters-leave-the-index"] = Late

    class Smallest(Wrapped):
        def top_k(self, queries, k):
            values, ids = super().top_k(queries, k)
            return values[:, ::-1], ids[:, ::-1]

    found["top-k-agrees-with-score"] = with_index(Smallest)

    class BatchMean(Wrapped):
        def score(self, queries):
            s = super().score(queries)
            return s - s.mean(0) if len(s) > 1 else s

    found["batches-do-not-matter"] = with_index(BatchMean)

    class SortedByLength(Wrapped):
        def score(self, queries):
            return super().score(sorted(queries, key=lambda q: len(q.text)))

    found["query-order-does-not-matter"] = with_index(SortedByLength)

    @dataclass(frozen=True, kw_only=True)
    class NoisyPlaces(Honest):
        def encode(self, context, examples, role):
            rows = super().encode(context, examples, role)
            return rows + 0.1 * context.rng("noise").random(rows.shape, dtype=np.float32)

    found["corpus-order-does-not-matter"] = NoisyPlaces

    @dataclass(frozen=True, kw_only=True)
    class ReadsTasks(Honest):
        def encode(self, context, examples, role):
            rows = super().encode(context, examples, role)
            rows[:, 0] += [crc32(e.task.encode()) % 5 for e in examples]
            return rows

    found["labels-do-not-matter"] = ReadsTasks

    @dataclass(frozen=True, kw_only=True)
    class LeavesAProcess(Honest):
        def encode(self, context, examples, role):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            return super().encode(context, examples, role)

    found["leaves-nothing-running"] = LeavesAProcess

    class FirstCountsDouble(Wrapped):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.pooling = "own"

        def score_groups(self, queries, groups):
            s = self.score(queries)
            columns = [s[:, g].sum(1) + (s[:, g[:1]].sum(1) if len(g) > 1 else 0) for g in groups]
            return np.stack(columns or [s[:, :0].sum(1)], axis=1)[:, : len(groups)]

    found["order-in-a-group-does-not-matter"] = with_index(FirstCountsDouble)

    class SquaredGroups(Wrapped):
        def score_groups(self, queries, groups):
            return super().score_groups(queries, groups) ** 2

    found["group-of-one-equals-score"] = with_index(SquaredGroups)

    class SumsCalledMean(Wrapped):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.pooling = "mean"

        def score_groups(self, queries, groups):
            return pool_scores(self.score(queries), groups, "sum")

    found["groups-follow-the-declared-pooling"] = with_index(SumsCalledMean)

    @dataclass(frozen=True, kw_only=True)
    class GlobalDraw(Honest):
        def encode(self, context, examples, role):
            rows = super().encode(context, examples, role)
            return rows * np.random.random(self.width).astype(np.float32)

    found["same-seed-same-scores"] = GlobalDraw

    class InPlaceDamping(Wrapped):
        def score(self, queries):
            self.rows = self.rows * np.float32(0.9)
            return super().score(queries)

    found["second-call-equals-the-first"] = with_index(InPlaceDamping)

    class Forgetful(Wrapped):
        def save(self, path):
            super().save(path)
            (path / "extra.pkl").write_bytes(b"\x80\x04]\x94.")

    found["save-and-load-round-trip"] = with_index(Forgetful)

    @dataclass(frozen=True, kw_only=True)
    class Trains(Honest):
        def encode(self, context, examples, role):
            context.target.model("warm").requires_grad_(True)
            return super().encode(context, examples, role)

    found["model-is-untouched"] = Trains

    @dataclass(frozen=True, kw_only=True)
    class Seeds(Honest):
        def encode(self, context, examples, role):
            random.seed(0)
            return super().encode(context, examples, role)

    found["globals-are-untouched"] = Seeds

    @dataclass(frozen=True, kw_only=True)
    class Litters(Honest):
        def encode(self, context, examples, role):
            beside = Path(str(context.scratch) + ".cache")
            beside.write_text("features")
            return super().encode(context, examples, role)

    found["writes-only-in-scratch"] = Litters

    @dataclass(frozen=True, kw_only=True)
    class Chatty(Honest):
        def encode(self, context, examples, role):
            print("encoding", len(examples))
            return super().encode(context, examples, role)

    found["prints-nothing"] = Chatty

    class Harmful(Wrapped):
        def score(self, queries):
            return -super().score(queries)

    found["a-copy-outranks-others"] = with_index(Harmful)

    class Shuffled(Wrapped):
        def score_some(self, queries, candidates):
            return super().score_some(queries, candidates)[:, ::-1].copy()

    found["some-scores-agree-with-score"] = with_index(Shuffled)
    return found


OFFENDERS = offenders()


@parametrize_with_laws([Honest(), Honest(width=64, pooling="softmax-abs", temperature=0.1)])
def test_an_honest_method_keeps_every_law(method, law):
    law(method)


def test_every_law_has_an_offender_and_a_docstring():
    assert set(OFFENDERS) | {"import-is-light", "works-confined"} == set(LAWS)
    assert all(len(law.doc) > 20 for law in LAWS.values())


@pytest.fixture
def run(monkeypatch):
    """Runs one law on one method, in a case of its own."""
    cases = []

    def run(method, law):
        cases.append(Case(method))
        return check_law(LAWS[law], cases[-1])

    yield run
    for case in cases:
        case.close()


@pytest.mark.parametrize("law", sorted(OFFENDERS))
def test_the_law_catches_its_offender(run, law):
    result = run(OFFENDERS[law](), law)
    assert result.status == "failed"
    assert not result.where, result.where  # a verdict of the law, not an accident
    assert run(Honest(), law).status == "passed"


@pytest.mark.parametrize(
    "law", ["prints-nothing", "writes-only-in-scratch", "model-is-untouched", "described"]
)
def test_the_offender_breaks_no_other_law(law):
    assert {r.law for r in check_method(OFFENDERS[law]()) if r.status == "failed"} == {law}


def test_import_is_light(run, tmp_path, monkeypatch):
    source = (
        "from dataclasses import dataclass\n{}\n"
        "from tdabench.api import RepresentationMethod\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class M(RepresentationMethod):\n"
        "    name = 'm'\n"
        "    def encode(self, context, examples, role): ...\n"
    )
    (tmp_path / "heavy_plugin.py").write_text(source.format("import torch"))
    (tmp_path / "light_plugin.py").write_text(source.format(""))
    monkeypatch.syspath_prepend(tmp_path)
    import heavy_plugin
    import light_plugin

    heavy = run(heavy_plugin.M(), "import-is-light")
    assert heavy.status == "failed"
    assert "importing heavy_plugin loads torch" in heavy.detail
    assert run(light_plugin.M(), "import-is-light").status == "passed"
    sys.modules.pop("heavy_plugin")


CONFINED = """
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tdabench.api import RepresentationMethod

SECRET = Path({secret!r})


class Lengths(RepresentationMethod):
    family = "text"
    summary = "lengths"

    def encode(self, context, examples, role):
        self.reach(context, role)
        return np.array([[len(e.text), 1] for e in examples], dtype=np.float32) + self.offset()

    def reach(self, context, role): ...

    def offset(self):
        return 0


@dataclass(frozen=True, kw_only=True)
class Keeps(Lengths):
    name = "keeps"

    def reach(self, context, role):
        (context.scratch / "mine").write_text("written")
        json.loads((context.target.folder / "config.json").read_text())


@dataclass(frozen=True, kw_only=True)
class Reads(Lengths):
    name = "reads"

    def reach(self, context, role):
        SECRET.read_text()


@dataclass(frozen=True, kw_only=True)
class Writes(Lengths):
    name = "writes"

    def reach(self, context, role):
        if role == "query":
            SECRET.with_name("other").write_text("written")


@dataclass(frozen=True, kw_only=True)
class Falls(Lengths):
    name = "falls"

    def offset(self):
        try:
            return len(SECRET.read_text())
        except OSError:
            return 0


@dataclass(frozen=True, kw_only=True)
class Dies(Lengths):
    name = "dies"

    def reach(self, context, role):
        try:
            SECRET.read_text()
        except OSError:
            os._exit(3)
"""


@pytest.fixture
def confined_plugin(tmp_path):
    """A plugin's file, not on the path, as `--plugin FILE` gives it."""
    from tdabench.registry import import_plugin

    (tmp_path / "secret").write_text("a number of words")
    file = tmp_path / "confined_plugin.py"
    file.write_text(CONFINED.format(secret=str(tmp_path / "secret")))
    yield import_plugin(str(file))
    sys.modules.pop("confined_plugin")


@pytest.mark.skipif(not sandbox.abi(), reason="this system has no Landlock")
def test_works_confined(run, confined_plugin):
    kept = run(confined_plugin.Keeps(), "works-confined")
    assert (kept.status, kept.detail) == ("passed", "")
    for cls, said in (
        (confined_plugin.Reads, "confined, build raised PermissionError"),
        (confined_plugin.Writes, "confined, score raised PermissionError"),
        (confined_plugin.Falls, "A refused access may have been ignored"),
        (confined_plugin.Dies, "confined, build failed: its process died"),
    ):
        result = run(cls(), "works-confined")
        assert (result.status, result.where) == ("failed", "")
        assert said in result.detail
    assert "secret" in run(confined_plugin.Reads(), "works-confined").detail


def test_works_confined_is_skipped_with_the_reason(run, monkeypatch):
    local = run(OFFENDERS["prints-nothing"](), "works-confined")
    assert local.status == "skipped"
    assert "cannot be imported by that name" in local.detail or not sandbox.abi()
    monkeypatch.setattr(sandbox, "abi", lambda: 0)
    result = run(Honest(), "works-confined")
    assert result.status == "skipped"
    assert result.detail.startswith("this system has no Landlock")


# ------------------------------------------------------------------ more ways to break a law


def mutable():
    @dataclass
    class Mutable(Honest.__mro__[2]):  # type: ignore[misc]  # TDAMethod
        name = "mutable"
        summary = "can be changed"
        tags: list = dataclasses.field(default_factory=list)

        def build(self, context, train): ...
        def load(self, context, path): ...

    return Mutable


def opens_a_file():
    @dataclass(frozen=True, kw_only=True)
    class Opens(Honest):
        def __post_init__(self):
            open(os.devnull.replace("null", "urandom"), "rb").close()
            open(__file__.replace(".py", ".md"), "ab").close()
            os.remove(__file__.replace(".py", ".md"))

    return Opens


def leaves_gradients():
    @dataclass(frozen=True, kw_only=True)
    class Gradients(Honest):
        def encode(self, context, examples, role):
            import torch

            p = next(context.target.model("base").parameters())
            p.grad = torch.zeros_like(p)
            return super().encode(context, examples, role)

    return Gradients


def changes_weights():
    @dataclass(frozen=True, kw_only=True)
    class Weights(Honest):
        def encode(self, context, examples, role):
            next(context.target.model("base").parameters()).data[0] += 1e-3
            return super().encode(context, examples, role)

    return Weights


def changes_the_environment():
    @dataclass(frozen=True, kw_only=True)
    class Environment(Honest):
        def encode(self, context, examples, role):
            os.environ["TDABENCH_OFFENDER"] = "1"
            return super().encode(context, examples, role)

    return Environment


def needs_scratch_after_saving():
    class Lazy(Wrapped):
        def score(self, queries):
            (self.context.scratch / "rows").read_text()
            return super().score(queries)

    @dataclass(frozen=True, kw_only=True)
    class Method(Honest):
        def build(self, context, train):
            (context.scratch / "rows").write_text("here")
            return Lazy.of(super().build(context, train))

        def load(self, context, path):
            return Lazy.of(super().load(context, path))

    return Method


def no_default():
    @dataclass(frozen=True, kw_only=True)
    class NoDefault(Honest):
        depth: int

    return lambda: NoDefault(depth=1)


def wrong_shape():
    class Transposed(Wrapped):
        def score(self, queries):
            return super().score(queries).T

    return with_index(Transposed)


def half_precision():
    class Half(Wrapped):
        def score(self, queries):
            return super().score(queries).astype(np.float16)

    return with_index(Half)


def reads_further_fields():
    @dataclass(frozen=True, kw_only=True)
    class ReadsMeta(Honest):
        def encode(self, context, examples, role):
            rows = super().encode(context, examples, role)
            rows[:, 0] += ["fact" in e.meta for e in examples]
            return rows

    return ReadsMeta


def leaves_an_orphan():
    class Daemonises(Wrapped):
        def score(self, queries):
            code = "import subprocess as s; s.Popen(['sleep', '61'], start_new_session=True)"
            subprocess.run([sys.executable, "-c", code], check=True)
            return super().score(queries)

    return with_index(Daemonises)


def leaves_a_thread():
    @dataclass(frozen=True, kw_only=True)
    class Threaded(Honest):
        def encode(self, context, examples, role):
            threading.Thread(target=time.sleep, args=(3,), name="behind", daemon=True).start()
            return super().encode(context, examples, role)

    return Threaded


@pytest.mark.parametrize(
    ("make", "law", "said"),
    [
        (reads_further_fields, "labels-do-not-matter", "labels replaced"),
        (leaves_an_orphan, "leaves-nothing-running", "scoring left running: the process sleep 61"),
        (leaves_a_thread, "leaves-nothing-running", "build left running: the thread 'behind'"),
        (mutable, "construction-does-no-work", "must be immutable"),
        (opens_a_file, "construction-does-no-work", "opened"),
        (leaves_gradients, "model-is-untouched", "gradients were left"),
        (changes_weights, "model-is-untouched", "its weights changed"),
        (changes_the_environment, "globals-are-untouched", "environment variables"),
        (needs_scratch_after_saving, "save-and-load-round-trip", "FileNotFoundError"),
        (no_default, "parameters-are-checked", "'depth' has no default"),
        (wrong_shape, "shapes-and-finiteness", "expected [query, train]"),
        (half_precision, "shapes-and-finiteness", "float16"),
    ],
)
def test_other_offences(run, make, law, said):
    result = run(make()(), law)
    assert result.status == "failed"
    assert said in result.detail
    assert "TDABENCH_OFFENDER" not in os.environ


# ------------------------------------------------------------------ waivers, skips, accidents


@dataclass(frozen=True, kw_only=True)
class Waived(Honest):
    """Noise that says so."""

    name = "waived"
    expected_failures: ClassVar = {"a-copy-outranks-others": "scores are noise"}

    def encode(self, context, examples, role):
        rows = [np.random.default_rng(crc32(e.id.encode())).normal(size=64) for e in examples]
        return np.array(rows, dtype=np.float32).reshape(len(examples), 64)


@parametrize_with_laws([Waived])
def test_a_declared_failure_is_a_strict_xfail(method, law):
    law(method)


def test_waivers(run):
    assert run(Waived(), "a-copy-outranks-others").status == "expected"
    assert run(Waived(), "a-copy-outranks-others").detail == "scores are noise"

    @dataclass(frozen=True, kw_only=True)
    class Needless(Honest):
        expected_failures: ClassVar = {"prints-nothing": "it used to"}

    needless = run(Needless(), "prints-nothing")
    assert (needless.status, needless.ok) == ("unexpected", False)

    @dataclass(frozen=True, kw_only=True)
    class Misspelt(Honest):
        expected_failures: ClassVar = {"prints-nothin": "typo"}

    assert "do not exist: ['prints-nothin']" in run(Misspelt(), "described").detail

    @dataclass(frozen=True, kw_only=True)
    class Crashes(Waived):
        def encode(self, context, examples, role):
            raise ZeroDivisionError("a bug")

    crash = run(Crashes(), "a-copy-outranks-others")
    assert crash.status == "failed"  # a waiver does not excuse a crash
    assert "raised ZeroDivisionError: a bug" in crash.detail


def test_missing_packages_and_assets_skip(run):
    @dataclass(frozen=True, kw_only=True)
    class NeedsPackage(Honest):
        def encode(self, context, examples, role):
            raise MissingExtra("FAISS", remedy="Install it with: pip install faiss-cpu")

    @dataclass(frozen=True, kw_only=True)
    class NeedsAsset(Honest):
        def encode(self, context: Context, examples, role):
            context.asset("encoder")
            return super().encode(context, examples, role)

    assert "Install it with: pip install faiss-cpu" in run(NeedsPackage(), "prints-nothing").detail
    assert run(NeedsAsset(), "prints-nothing").status == "skipped"
    given = list(check_method(NeedsAsset(), ["prints-nothing"], {"encoder": Path(".")}))
    assert given[0].status == "passed"


def test_a_method_that_declares_it_may_read_labels(run):
    @dataclass(frozen=True, kw_only=True)
    class Declares(OFFENDERS["labels-do-not-matter"]):
        reads_labels: ClassVar = True

    result = run(Declares(), "labels-do-not-matter")
    assert (result.status, result.detail) == ("skipped", "it declares reads_labels = True")


def test_what_is_left_running_is_ended(run):
    from tdabench.testing.watch import left_running

    run(OFFENDERS["leaves-nothing-running"](), "leaves-nothing-running")
    with left_running() as left:
        run(leaves_an_orphan()(), "leaves-nothing-running")
        assert not left()


def test_an_unknown_law_is_named():
    with pytest.raises(UsageError, match="Did you mean 'prints-nothing'"):
        list(check_method(Honest(), ["print-nothing"]))


def test_an_index_without_rows_is_checked_too(run):
    class Own(Index):
        def __init__(self, n):
            self.n_train = n

        def score(self, queries):
            out = np.zeros((len(queries), self.n_train), dtype=np.float32)
            return out + np.arange(self.n_train, dtype=np.float32)

        def save(self, path):
            write_arrays(path / "n.safetensors", {"n": np.array([self.n_train])})

    from tdabench.api import TDAMethod, read_arrays

    @dataclass(frozen=True)
    class Places(TDAMethod):
        name = "places"
        summary = "scores by place in the corpus"

        def build(self, context, train):
            return Own(len(train))

        def load(self, context, path):
            return Own(int(read_arrays(path / "n.safetensors")[0]["n"][0]))

    broken = {r.law for r in check_method(Places()) if not r.ok}
    assert broken == {
        "corpus-order-does-not-matter",
        "order-in-a-group-does-not-matter",
        "a-copy-outranks-others",
    }
