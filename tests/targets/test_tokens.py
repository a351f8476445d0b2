"""From text to tokens: the one rule, its warning, and a fingerprint of what tokenising does."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdabench.data import Example
from tdabench.errors import DataError
from tdabench.run.sources import load_suite
from tdabench.targets import Target
from tdabench.targets.tokenizer import reads_plainly

END = "<|endoftext|>"
TEXT = Example("a", "Copy: amber 5", "amber birch")


@pytest.fixture
def folder(tiny_target: Target, tmp_path: Path) -> Path:
    """The tiny target's folder, to change."""
    return Path(shutil.copytree(tiny_target.folder, tmp_path / "target"))


def target_in(folder: Path, **changes: Any) -> Target:
    return Target("m", folder, {"base": "base.safetensors"}, **{"max_length": 128, **changes})


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    kept = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))


def set_tokenizer(folder: Path, change: Any) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def with_beginning(data: dict[str, Any]) -> None:
    """The tokenizer puts a token of its own before every text."""
    token = {"id": 299, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    data["added_tokens"].append(token)
    piece: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    first: dict[str, Any] = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing", "single": [first, piece], "pair": [first, piece, piece],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [299], "tokens": ["<s>"]}},
    }  # fmt: skip
    words = data["model"]["vocab"]
    for word in [w for w, i in words.items() if i == 299]:
        del words[word]
        data["model"]["merges"] = [
            m for m in data["model"]["merges"] if "".join(m) != word and word not in m
        ]


def sentencepiece_like(folder: Path) -> None:
    """A tokenizer that puts a space before a text, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = "Q : A Copy amber birch cedar 5 5 5 \n Q: Copy: amber 5 \nA: amber birch".split(" ")
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        special_tokens=[END, "<unk>"],
        show_progress=False,
        initial_alphabet=list("QACopyamberbirchcedar50123456789:\n ▁"),
    )
    t.train_from_iterator([" ".join(words)] * 3, trainer)
    t.save(str(folder / "tokenizer.json"))


# --------------------------------------------------------------------------- the rule


def test_a_beginning_that_the_tokenizer_adds_comes_first_and_once(folder: Path) -> None:
    plain = target_in(folder).tokenize([TEXT])[0].ids
    set_tokenizer(folder, with_beginning)
    target = target_in(folder)
    (t,) = target.tokenize([TEXT])
    assert t.ids[0] == 299
    assert (t.ids[1:] != 299).all()
    assert target.tokenizer.decode(t.ids[1 : t.start]) == "Q: Copy: amber 5\nA:"
    assert t.ids[-1] == target.tokenizer.eos_token_id
    assert len(t) == len(plain) + 1 or 299 in plain
    (only,) = target.tokenize([TEXT], role="prompt")
    np.testing.assert_array_equal(only.ids, t.ids[: t.start])
    # It stays when a prompt is cut on the left, and alone it is what precedes a response.
    (cut,) = target_in(folder, truncate="prompt-left", max_length=8).tokenize([TEXT])
    assert cut.ids[0] == 299
    assert len(cut) == 8
    (bare,) = target_in(folder, template="none").tokenize([Example("b", "", "amber")])
    assert bare.ids[: bare.start].tolist() == [299]


def test_chat_templates_write_their_own_beginning(folder: Path) -> None:
    set_tokenizer(folder, with_beginning)
    (folder / "chat_template.jinja").write_text("<s>{{ messages[0]['content'] }}|")
    (t,) = target_in(folder, template="chat").tokenize([TEXT])
    assert (t.ids == 299).sum() == 1
    assert t.ids[0] == 299


def test_a_response_has_no_space_that_the_tokenizer_puts_before_a_text(folder: Path) -> None:
    sentencepiece_like(folder)
    target = target_in(folder)
    (t,) = target.tokenize([TEXT])
    tokens = target.tokenizer.convert_ids_to_tokens(t.ids[t.start : -1])
    assert "".join(tokens) == "▁amber▁birch"
    bare = target_in(folder, template="none")
    (t,) = bare.tokenize([TEXT])
    assert "".join(bare.tokenizer.convert_ids_to_tokens(t.ids[t.start : -1])) == "amber▁birch"


def test_examples_that_are_other_tokens_as_one_text_are_counted(
    folder: Path, tiny_corpus: Any
) -> None:
    assert target_in(folder).apart(tiny_corpus) == 0
    joined = target_in(folder, template="none")
    assert (
        joined.apart(
            [Example("a", "am", "ber"), Example("b", "Copy:", " x"), Example("c", "", "x")]
        )
        == 1
    )


# --------------------------------------------------------------------------- identity


def test_whatever_changes_tokens_changes_the_fingerprint(folder: Path) -> None:
    seen = [target_in(folder).fingerprint]

    def changed(message: str) -> None:
        found = target_in(folder).fingerprint
        assert found not in seen, message
        seen.append(found)

    set_config(folder, eos_token="A")  # other ends, template plain
    changed("end of text")
    set_config(folder, eos_token=END, add_prefix_space=True)
    changed("a setting that nobody knows")
    set_config(folder, add_prefix_space=None)
    assert target_in(folder).fingerprint == seen[0]
    (folder / "added_tokens.json").write_text('{"amber": 299}')
    changed("added tokens")
    (folder / "added_tokens.json").unlink()
    set_tokenizer(folder, with_beginning)
    changed("a beginning")


def test_what_reaches_no_token_leaves_the_fingerprint_alone(folder: Path) -> None:
    before = target_in(folder).fingerprint
    set_config(folder, model_max_length=77, clean_up_tokenization_spaces=True, padding_side="left")
    assert target_in(folder).fingerprint == before


def test_a_fingerprint_is_measured_once_a_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    set_tokenizer(folder, with_beginning)
    first = target_in(folder).fingerprint
    assert len(list((tmp_path / "cache" / "readings").glob("*.json"))) == 1

    def never(self: Target) -> str:
        raise AssertionError

    monkeypatch.setattr(Target, "_read", never)
    assert target_in(folder).fingerprint == first
    with pytest.raises(AssertionError):
        _ = target_in(folder, template="alpaca").fingerprint


def test_the_targets_of_pocket_read_as_their_files_say() -> None:
    """So that their fingerprints, which the shipped truths name, need no measurement."""
    for declared in load_suite("pocket").targets:
        assert reads_plainly(declared.target.folder)
        assert declared.target._read() == ""


# --------------------------------------------------------------------------- templates, sizes

CLOCK = (
    "{%- if not date is defined %}{%- set date = strftime_now('%d %b %Y, %-d.%m.%y') %}{%- endif %}"
    "\n  Today: {{ date }}\n{{ messages[0]['content'] }}"
)


def test_a_chat_template_with_a_clock_has_one_date(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    (folder / "chat_template.jinja").write_text(CLOCK)
    target = target_in(folder, template="chat")
    text = target.prompt_text(TEXT)
    assert text == "  Today: 26 Jul 2024, 26.07.24\nCopy: amber 5"

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    again = target_in(folder, template="chat")
    assert again.prompt_text(TEXT) == text
    assert again.fingerprint == target.fingerprint


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}", "{# x #}\n\n", "{{ '' }}\n"])
def test_a_template_without_a_clock_is_written_as_transformers_writes_it(
    folder: Path, start: str
) -> None:
    end = "{% endif %}" if "if" in start else ""
    (folder / "chat_template.jinja").write_text(f"{start}[{{{{ messages[0]['content'] }}}}]{end}\n")
    target = target_in(folder, template="chat")
    want = target.tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT.prompt}], tokenize=False, add_generation_prompt=True
    )
    assert target.prompt_text(TEXT) == want


def test_a_chat_template_that_draws_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ range(1000) | random }}")
    with pytest.raises(DataError, match="formats the same conversation differently"):
        target_in(folder, template="chat").tokenize([TEXT])


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(folder: Path) -> None:
    set_tokenizer(
        folder,
        lambda data: data["added_tokens"].append(
            {
                "id": 300,
                "content": "<extra>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ),
    )
    with pytest.raises(DataError, match=r"ids up to 300.*300 rows.*resize"):
        target_in(folder).model()
