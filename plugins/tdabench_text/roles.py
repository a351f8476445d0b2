"""Parts of an example that text methods read: prompt, response, or both.

Gradient methods differentiate the loss of the response alone. A text method that reads prompts
as well compares other things than they do, so the part is a parameter of both sides, recorded
and tuned like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tdabench.api import Example, Role

Part = Literal["both", "prompt", "response"]
PARTS: tuple[Part, ...] = ("both", "prompt", "response")
PART_GRID: Mapping[str, tuple[Any, ...]] = {"train_text": PARTS, "query_text": PARTS}


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Adds the part read of training examples and of queries.

    train_text  what is read of a training example: prompt, response, or both joined
    query_text  what is read of a query"""

    train_text: Part = "both"
    query_text: Part = "both"

    def part(self, role: Role) -> Part:
        """Returns the part that is read of an example in this role."""
        return self.query_text if role == "query" else self.train_text

    def texts(self, examples: Sequence[Example], role: Role) -> list[str]:
        """Returns that part of each example: [example]."""
        part = self.part(role)
        if part == "both":
            return [e.text for e in examples]
        return [e.prompt if part == "prompt" else e.response for e in examples]
