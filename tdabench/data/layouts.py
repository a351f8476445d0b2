"""Layouts: which fields of a row are the prompt, the response, the task and the id.

Layouts are recognised by their fields, in this order; `fields` maps any others. A path such as
`messages.0.content` reaches into lists and objects.

    native      prompt, response, task, id
    completion  prompt, completion
    flan        inputs, targets, task
    alpaca      instruction, input, output          a non-empty input follows the instruction
    dolly       instruction, context, response      likewise the context; the task is `category`
    chat        messages or conversations           the first user turn and its answer
    ultrachat   data: [prompt, response, …]         the first two
    qa          question, answer
    text        text                                no prompt: the whole text is the response
    airrep      any of them, as read by the code behind AirRep's published truth; on request
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdabench.data.examples import Example
from tdabench.errors import UsageError, did_you_mean, unknown

ROLES = ("prompt", "response", "task", "id")
EMPTY = ("error", "keep", "skip")
Row = Mapping[str, Any]


class BadRow(Exception):
    """A problem with a row; the reader of the file adds the file and line."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


@dataclass(frozen=True)
class Layout:
    """A name, its identifying fields, and how prompt and response are read from a row."""

    marks: tuple[str, ...]
    read: Callable[[Row], tuple[str, str]]
    used: tuple[str, ...]  # fields that do not go to `meta`
    task: str = "task"
    # Where one of the two is mapped, how the other is read; else both are.
    prompt: Callable[[Row], str] | None = None
    response: Callable[[Row], str] | None = None

    def rest(self, row: Row, role: str) -> str:
        """Returns the prompt or response of a row whose other part is mapped."""
        read = self.prompt if role == "prompt" else self.response
        return read(row) if read is not None else self.read(row)[ROLES.index(role)]


def _with_more(name: str) -> Callable[[Row], str]:
    """The prompt of a row: its instruction, and the field `name` if that is there and not empty."""

    def prompt(row: Row) -> str:
        instruction, more = _text(row, "instruction"), row.get(name) or ""
        if not isinstance(more, str):
            raise BadRow(f"the field {name!r} is not a string")
        return f"{instruction}\n\n{more}" if more.strip() else instruction

    return prompt


def _instructed(more: str, response: str) -> Callable[[Row], tuple[str, str]]:
    prompt = _with_more(more)
    return lambda row: (prompt(row), _text(row, response))


def _chat(row: Row) -> tuple[str, str]:
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadRow("the conversation is not a list of turns")
    system, prompt = "", None
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadRow("a turn of the conversation is not an object")
        who = str(turn.get("role", turn.get("from", "")))
        said = turn.get("content", turn.get("value"))
        if not isinstance(said, str):
            raise BadRow("a turn of the conversation has no text")
        if who == "system":
            system = said
        elif who in ("user", "human"):
            prompt = said if prompt is None else f"{prompt}\n\n{said}"
        elif who in ("assistant", "gpt", "model") and prompt is not None:
            return (f"{system}\n\n{prompt}" if system else prompt), said
    raise BadRow("the conversation has no user turn with an answer")


def _ultrachat(row: Row) -> tuple[str, str]:
    data = row.get("data")
    if not isinstance(data, Sequence) or isinstance(data, str) or len(data) < 2:
        raise BadRow("the field 'data' is not a list of at least two turns")
    if not all(isinstance(x, str) for x in data[:2]):
        raise BadRow("the first two turns of 'data' are not strings")
    return data[0], data[1]


def _airrep(row: Row) -> tuple[str, str]:
    """Reads a row like the public code behind AirRep's published truth (`format_item`).

    Takes the first 100 words of UltraChat's first turn, and Alpaca's input only without an
    instruction.
    """
    prompt = response = None
    if "data" in row:
        prompt, response = _ultrachat(row)
        prompt = " ".join(prompt.split()[:100])
    if "input" in row:
        prompt = f"{row.get('instruction', '')} {_text(row, 'input')}"
    for name in ("inputs", "prompt", "instruction"):
        if name in row:
            prompt = _text(row, name)
            break
    for name in ("response", "targets", "output"):
        if name in row:
            response = _text(row, name)
            break
    if prompt is None or response is None:
        raise BadRow(f"no {'prompt' if prompt is None else 'response'} in a row of this layout")
    return prompt, response


def _plain(prompt: str, response: str) -> Layout:
    """A layout of two fields."""
    return Layout(
        (prompt, response),
        lambda row: (_text(row, prompt), _text(row, response)),
        (prompt, response),
        prompt=lambda row: _text(row, prompt),
        response=lambda row: _text(row, response),
    )


LAYOUTS: dict[str, Layout] = {
    "native": _plain("prompt", "response"),
    "completion": _plain("prompt", "completion"),
    "flan": _plain("inputs", "targets"),
    "alpaca": Layout(
        ("instruction", "output"),
        _instructed("input", "output"),
        ("instruction", "input", "output"),
        prompt=_with_more("input"),
        response=lambda row: _text(row, "output"),
    ),
    "dolly": Layout(
        ("instruction", "response"),
        _instructed("context", "response"),
        ("instruction", "context", "response", "category"),
        task="category",
        prompt=_with_more("context"),
        response=lambda row: _text(row, "response"),
    ),
    "chat": Layout(("messages",), _chat, ("messages", "conversations")),
    "conversations": Layout(("conversations",), _chat, ("messages", "conversations")),
    "ultrachat": Layout(("data",), _ultrachat, ("data",)),
    "qa": _plain("question", "answer"),
    "text": Layout(("text",), lambda row: ("", _text(row, "text")), ("text",)),
    "airrep": Layout(
        (),
        _airrep,
        ("data", "input", "inputs", "prompt", "instruction", "response", "targets", "output"),
    ),
}


@dataclass(frozen=True)
class Reading:
    """The conversion of rows to examples.

    `layout` names a layout or is "auto"; `fields` maps a role (prompt, response, task, id) to the
    field, or path of fields, that holds it. `split` and `tasks` select rows. `empty` decides about
    a row without a response: an error, kept (only the end of text is trained), or skipped.
    """

    layout: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    tasks: tuple[str, ...] = ()
    empty: str = "error"

    def __post_init__(self) -> None:
        if self.layout != "auto" and self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, ["auto", *LAYOUTS])
        for role in self.fields:
            if role not in ROLES:
                raise unknown("role of a field", role, ROLES)
        if self.empty not in EMPTY:
            raise UsageError(
                f"unknown rule {self.empty!r} for empty responses", f"One of: {', '.join(EMPTY)}"
            )

    def as_list(self) -> list[Any]:
        """Returns the settings that determine the examples, for fingerprints."""
        return [
            self.layout, dict(sorted(self.fields.items())), self.split, list(self.tasks), self.empty
        ]  # fmt: skip

    def layout_of(self, row: Row) -> Layout | None:
        """Returns the layout of a row; None if `fields` alone names prompt and response.

        Raises BadRow if no layout fits.
        """
        if self.layout != "auto":
            return LAYOUTS[self.layout]
        for layout in LAYOUTS.values():
            if layout.marks and all(m in row for m in layout.marks):
                return layout
        if len(set(self.fields) & {"prompt", "response"}) == 1:
            other = 1 if "prompt" in self.fields else 0
            for layout in LAYOUTS.values():  # what usually holds the role that is not mapped does
                if layout.prompt is not None and layout.marks[other] in row:
                    return layout
        if "response" in self.fields:
            return None
        for name in ("prompt", "response"):  # one of the two exists, so the file is native
            if name in row:
                return LAYOUTS["native"]
        raise BadRow(
            f"no known layout has these fields: {', '.join(map(repr, list(row)[:8])) or '(none)'}",
            "Map the fields: --field prompt=NAME --field response=NAME (in a suite: "
            f"fields = {{ prompt = … }}). Known layouts: {', '.join(LAYOUTS)}",
        )

    def example(self, row: Row, layout: Layout | None, default_id: str) -> Example | None:
        """Returns the example in a row, or None if it is not kept. Raises BadRow."""
        if self.split is not None and row.get("split") != self.split:
            return None
        task = self._optional(row, "task", layout.task if layout else "task")
        if self.tasks and task not in self.tasks:
            return None
        prompt = response = None
        if layout is not None and not {"prompt", "response"} & set(self.fields):
            prompt, response = layout.read(row)
        if "prompt" in self.fields:
            prompt = _reach(row, self.fields["prompt"])
        elif "response" in self.fields and layout is not None:
            prompt = layout.rest(row, "prompt")
        if "response" in self.fields:
            response = _reach(row, self.fields["response"])
        elif "prompt" in self.fields and layout is not None:
            response = layout.rest(row, "response")
        if response is None:
            raise BadRow("no field contains the response", "Map it: --field response=NAME")
        if not response.strip():
            if self.empty == "skip":
                return None
            if self.empty == "error":
                raise BadRow(
                    "the response is empty",
                    "Nothing would be trained on: remove the line, or pass --empty skip (leave "
                    'such lines out) or --empty keep (in a suite: empty = "keep")',
                )
        used = {*(layout.used if layout else ()), *self.fields.values(), "id", "task"}
        kept = {k: v for k, v in row.items() if k not in used and isinstance(v, str)}
        id = self._optional(row, "id", "id") or default_id
        for text in (id, prompt or "", response, task, *kept, *kept.values()):
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise BadRow("half of a surrogate pair, which is not valid text", "Re-encode it")
        return Example(id, prompt or "", response, task, kept)

    def _optional(self, row: Row, role: str, default: str) -> str:
        if role in self.fields:
            return _reach(row, self.fields[role], role)
        value = row.get(default, "")
        if isinstance(value, str) or value is None:
            return value or ""
        if isinstance(value, int) and not isinstance(value, bool):  # labels of classes, too
            return _digits(value)
        raise BadRow(f"the {role} is neither a string nor an integer")


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        what = f"is {type(value).__name__}, not a string" if name in row else "is missing"
        remedy = "All rows must have the fields of the first. Fix or remove the line"
        others = [k for k in row if k not in ROLES][:8]
        if name in ROLES and name not in row and others:
            remedy = (
                f"Another field may hold it ({', '.join(map(repr, others))}): --field {name}=NAME. "
                "Otherwise fix or remove the line"
            )
        raise BadRow(f"the field {name!r} {what}", remedy)
    return value


def _digits(value: int | float) -> str:
    try:
        return str(value)
    except ValueError:  # Python does not write integers of thousands of digits
        raise BadRow("a number of too many digits") from None


def _reach(row: Any, path: str, role: str = "") -> str:
    """Returns the string at a path such as `messages.0.content`; exact field names come first."""
    value, known = row, list(row) if isinstance(row, Mapping) else []
    if isinstance(row, Mapping) and path in row:
        value = row[path]
    else:
        for step in path.split("."):
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, Sequence) and not isinstance(value, str) and step.isdigit():
                if int(step) >= len(value):
                    raise BadRow(f"{path!r} reaches past the end of a list")
                value = value[int(step)]
            else:
                raise BadRow(f"there is no field {path!r}", did_you_mean(step, map(str, known)))
    if role in ("task", "id") and isinstance(value, (int, float)):
        return _digits(value)
    if not isinstance(value, str):
        raise BadRow(f"the field {path!r} is {type(value).__name__}, not a string")
    return value


def parse_fields(words: Iterable[str]) -> dict[str, str]:
    """Parses `["prompt=question", …]` into a mapping. Raises UsageError for anything else."""
    out = {}
    for word in words:
        role, equals, name = word.partition("=")
        if not (equals and role and name):
            raise UsageError(f"--field {word!r} does not have the form ROLE=FIELD")
        if role not in ROLES:
            raise unknown("role in --field", role, ROLES)
        out[role] = name
    return out
