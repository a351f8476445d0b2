"""From text to token ids.

The rule: the formatted prompt and the response are tokenised separately, the response as a
continuation, and concatenated, so that a prompt has the same tokens before every response. What
the tokenizer adds at the beginning of a text is added once: its beginning-of-text token comes
first (chat templates contain their own), and the space that SentencePiece inserts before a text
precedes the prompt only. The end-of-text token, or the ending of the chat template, comes last.
`Target.apart` counts examples whose tokens would differ if the whole text were tokenised at once.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdabench.errors import DataError, first_line
from tdabench.io import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The date that chat templates print: Llama's own default for environments without a clock.
TODAY = datetime.datetime(2024, 7, 26, 12, 0, 0)

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")

# Settings that do not change token ids, or only in ways that the probe shows (end, beginning).
INERT = frozenset(
    "added_tokens_decoder additional_special_tokens backend bos_token chat_template "
    "clean_up_tokenization_spaces cls_token eos_token extra_special_tokens is_local "
    "local_files_only mask_token model_max_length model_specific_special_tokens name_or_path "
    "pad_token padding_side processor_class sep_token special_tokens_map_file tokenizer_class "
    "truncation_side unk_token".split()
)

# Text that normalisers, pre-tokenizers, merges and byte fallbacks treat differently.
PROBE = (
    ("What is 12 plus 3075?", "3087"),
    ("Translate: the cat sat on the mat, didn't it?", "Le chat s'est assis sur le tapis."),
    ("  leading, trailing and   inner   spaces  ", "\n\n\tlines\r\nand tabs\n"),
    ("CamelCase snake_case kebab-case HTTPServer v1.2.3-rc4", "def f(x):\n    return x ** 2  # ok"),
    ("cafe\u0301 caf\u00e9 \ufb01ne \uff21\uff22\uff23 \u212b \u00bd", "STRASSE Straße İstanbul"),
    ("数学は楽しい。안녕하세요 Привет مرحبا नमस्ते", "🙂👩‍👩‍👧 €100 – “quoted” … ½"),
    ("http://example.org/a?b=c&d=%20#e", "a@b.co +49 (0)30 / 1,234.56 1e-5 0x1F"),
    ("", "an empty prompt"),
    ("an empty response", ""),
    ("\u00a0no-break\u200bzero width\ufeff", "aaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbb zzzzqqqq"),
)  # fmt: skip


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in a target's folder, with an end-of-text and a padding token.

    Raises DataError when there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers 5 selects the class by the model's type and lets it replace the
    # pre-tokenizer in tokenizer.json. A folder that names the plain class needs that class.
    config = folder / "tokenizer_config.json"
    plain = config.exists() and (read_json(config).get("tokenizer_class") in PLAIN_CLASSES)
    try:
        loader = PreTrainedTokenizerFast if plain else AutoTokenizer
        tokenizer = loader.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise DataError(
            f"the target {name!r} has no readable tokenizer: {first_line(e)}",
            "Put tokenizer.json beside the weights (a slow tokenizer: save it with "
            "save_pretrained)",
        ) from e
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {name!r} has no end-of-text token, which ends a response",
            "Name one as eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def reads_plainly(folder: Path) -> bool:
    """Returns whether tokenizer.json and the end of text in config.json decide all token ids.

    True for the plain tokenizer class of transformers if nothing is added before a text. A
    measurement gives the same result, but loads transformers.
    """
    try:
        if any((folder / f).exists() for f in ("special_tokens_map.json", "added_tokens.json")):
            return False
        settings = read_json(folder / "tokenizer_config.json")
        data = read_json(folder / "tokenizer.json")
        config = read_json(folder / "config.json")
        end = {t["content"]: t["id"] for t in data["added_tokens"]}[settings["eos_token"]]
    except (DataError, KeyError, TypeError):
        return False
    after = (data.get("post_processor") or {}).get("type", "ByteLevel")
    return (
        settings.get("tokenizer_class") in PLAIN_CLASSES
        and set(settings) <= INERT - {"added_tokens_decoder"}
        and end == config.get("eos_token_id")
        and after == "ByteLevel"
        and data.get("normalizer") is None
        and "Metaspace" not in str(data.get("pre_tokenizer"))
    )


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts without special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def added_first(tokenizer: Any) -> list[int]:
    """Returns the token ids that a tokenizer adds before a text: its beginning of text, or []."""
    plain = ids_of(tokenizer, ["a"])[0]
    whole = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    for k in range(len(whole) - len(plain) + 1):
        if plain and whole[k : k + len(plain)] == plain:
            return list(whole[:k])
    return []


def continuations(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts that continue another text.

    A space that the tokenizer inserts before every text is left out. A text that merges with the
    preceding character keeps the ids that it has alone.
    """
    alone = ids_of(tokenizer, texts)
    before = "\n"
    first, joined, single = ids_of(tokenizer, [before, f"{before}a", "a"])
    n = len(first)
    if joined[:n] != first or joined[n:] == single:
        return alone
    after = ids_of(tokenizer, [before + t for t in texts])
    return [w[n:] if w[:n] == first else a for w, a in zip(after, alone)]


def render_chat(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    """Formats a conversation with the tokenizer's chat template, at the date `TODAY`.

    A template is a program and may raise anything.
    """
    last = turns[-1][0]
    return str(
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=_CLOCK + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=last == "user",
        )
    )


def check_template(tokenizer: Any, name: str) -> None:
    """Raises DataError for a chat template that formats one conversation in several ways."""
    turns = [("user", "a"), ("assistant", "b")]
    if len({render_chat(tokenizer, turns) for _ in range(8)}) > 1:
        raise DataError(
            f"the chat template of {name!r} formats the same conversation differently each time",
            'Use another template: "plain", "alpaca", "question" or "none"',
        )


def _clock() -> str:
    """Returns a macro that replaces `strftime_now`, the clock of transformers for templates.

    The line break after it is removed with it (templates are compiled with `trim_blocks`), so the
    template still begins at the beginning of a line.
    """
    codes = [*(f"-{c}" for c in "dmHIMSjy"), *"aAbBcdHIjmMpSUwWxXyYfzZ"]
    steps = "".join(f" | replace('%{c}', '{TODAY.strftime('%' + c)}')" for c in codes)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}\n"


_CLOCK = _clock()
