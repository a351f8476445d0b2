"""Sources of training examples: what an example comes from, and groups that leave sources out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError
from tdabench.groups import Groups

COPY = "+copy"  # ends the id of an example's copy


def origins(examples: Sequence[Example], by: str = "") -> list[str]:
    """Returns the source of each example, "" where it has none.

    `by` names the field that holds it: "task", or a further field such as "source". By default it
    is the field `source` if any example has one, otherwise the task.
    """
    if not by:
        by = "source" if any(e.meta.get("source") for e in examples) else "task"
    return [e.task if by == "task" else str(e.meta.get(by, "")) for e in examples]


def members_by_origin(train: Sequence[Example], by: str = "") -> dict[str, np.ndarray]:
    """Returns the training indices of every source, by name in order; examples without one are
    left out.

    Raises DataError unless there are at least two sources.
    """
    of = origins(train, by)
    found = {name: np.flatnonzero([o == name for o in of]) for name in sorted(set(of) - {""})}
    if len(found) < 2:
        what = f"the field {by!r}" if by else "a field `source`, or a task"
        raise DataError(
            f"the training examples come from {len(found)} sources: two are needed to compare",
            f"Give the examples {what}",
        )
    return found


def without_each(train: Sequence[Example], by: str = "", only: Sequence[str] = ()) -> Groups:
    """Returns groups of kept examples: the corpus without each source in turn, then all of it.

    `only` names the sources to leave out; by default every source is.
    """
    everything = np.arange(len(train))
    members = members_by_origin(train, by)
    kept = [
        np.setdiff1d(everything, m, assume_unique=True)
        for name, m in members.items()
        if not only or name in only
    ]
    return Groups.of([*kept, everything], len(train))


def most_asked(train: Sequence[Example], queries: Sequence[Example], by: str, n: int) -> list[str]:
    """Returns the n sources of training examples that most queries belong to.

    Equal counts are ordered by name. Raises DataError if queries belong to fewer than n.
    """
    known = members_by_origin(train, by)
    asked = Counter(o for o in origins(queries, by) if o in known)
    ordered = sorted(asked, key=lambda name: (-asked[name], name))
    if len(ordered) < n:
        raise DataError(
            f"queries belong to {len(ordered)} sources of training examples, fewer than {n}",
            "Lower groups in the truth's plan, or leave it out for every source",
        )
    return ordered[:n]


def with_copies(train: Corpus, copied: Sequence[str], by: str = "") -> Corpus:
    """Returns the corpus with a copy of every example of the sources `copied` behind it.

    A copy has its example's texts, task and fields, and its own id.
    """
    of = origins(train, by)
    copies = [
        Example(e.id + COPY, e.prompt, e.response, e.task, e.meta)
        for name in copied
        for e, o in zip(train, of)
        if o == name
    ]
    return Corpus([*train, *copies], f"{train.name}-copies")


def copied_groups(train: Corpus, copied: Sequence[str], by: str = "") -> Groups:
    """Returns groups over `with_copies`: without any copy, then per source with its copy and
    without the source at all."""
    members = members_by_origin(train, by)
    n, at = len(train), len(train)
    groups = [np.arange(n)]
    for name in copied:
        size = len(members[name])
        groups.append(np.concatenate([np.arange(n), np.arange(at, at + size)]))
        groups.append(np.setdiff1d(np.arange(n), members[name]))
        at += size
    return Groups.of(groups, at)
