"""Behaviours: what a model does, as several examples or as one answer against another.

A behaviour is a weighted sum of losses. A set of examples is their mean loss; a contrast is the
loss of one response minus the loss of another to the same prompt. Its scores are positive for
training examples that lower this sum: that make the responses of a set likelier, or the first
response likelier than the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError

AGAINST = "+against"  # ends the id of a contrast's other response


@dataclass(frozen=True)
class Behaviour:
    """Examples and their weights: the loss of the behaviour is the weighted sum of theirs."""

    id: str
    examples: tuple[Example, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, id: str, examples: Iterable[Example]) -> Behaviour:
        """Makes a behaviour of examples with equal weights: their mean loss.

        An example with the field `against`, another response to its prompt, counts as a contrast:
        its loss minus the loss of that response. Raises DataError for an empty set.
        """
        own = list(examples)
        if not own:
            raise DataError(f"the behaviour {id!r} has no examples")
        parts: list[tuple[Example, float]] = []
        for e in own:
            parts.append((e, 1 / len(own)))
            if other := str(e.meta.get("against") or ""):
                against = Example(e.id + AGAINST, e.prompt, other, e.task)
                if other.strip() == e.response.strip():
                    raise DataError(f"{e.id}: the response and the one against it are the same")
                parts.append((against, -1 / len(own)))
        return cls(id, tuple(e for e, _ in parts), tuple(w for _, w in parts))

    @property
    def sides(self) -> tuple[list[Example], list[Example]]:
        """Returns the examples that count positively, and those that count negatively."""
        pairs = list(zip(self.examples, self.weights))
        return [e for e, w in pairs if w > 0], [e for e, w in pairs if w < 0]

    @property
    def task(self) -> str:
        tasks = {e.task for e in self.examples}
        return tasks.pop() if len(tasks) == 1 else ""

    @property
    def prompt(self) -> str:
        """The prompt of the first example, and how many more there are."""
        own, _ = self.sides
        more = f" (and {len(own) - 1} more)" if len(own) > 1 else ""
        return (own or list(self.examples))[0].prompt + more

    @property
    def response(self) -> str:
        """The first response, and the first against it."""
        own, against = self.sides
        text = (own or list(self.examples))[0].response
        return f"{text}, not: {against[0].response}" if own and against else text


def behaviours_of(examples: Sequence[Example], by: str) -> list[Behaviour]:
    """Groups examples by the field `by` ("task", or a further field), in the order of names.

    Examples without the field are left out. Raises DataError if none has it.
    """
    found: dict[str, list[Example]] = {}
    for e in examples:
        name = e.task if by == "task" else str(e.meta.get(by, ""))
        if name:
            found.setdefault(name, []).append(e)
    if not found:
        raise DataError(f"no query has the field {by!r}, by which behaviours are named")
    return [Behaviour.of(name, found[name]) for name in sorted(found)]


def contrast(id: str, a: Behaviour, b: Behaviour) -> Behaviour:
    """Returns the loss of behaviour `a` minus that of `b`."""
    return Behaviour(id, (*a.examples, *b.examples), (*a.weights, *(-w for w in b.weights)))


def parts_of(behaviours: Sequence[Behaviour]) -> tuple[Corpus, np.ndarray]:
    """Returns the examples of all behaviours, each once, and weights float32 [behaviour, example].

    Raises DataError where two examples have one id and different texts.
    """
    place: dict[str, int] = {}
    examples: list[Example] = []
    for b in behaviours:
        for e in b.examples:
            if place.setdefault(e.id, len(examples)) == len(examples):
                examples.append(e)
            elif examples[place[e.id]] != e:
                raise DataError(f"two examples of behaviours have the id {e.id!r}")
    weights = np.zeros((len(behaviours), len(examples)), dtype=np.float32)
    for i, b in enumerate(behaviours):
        for e, w in zip(b.examples, b.weights, strict=True):
            weights[i, place[e.id]] += w
    return Corpus(examples, "behaviours"), weights
