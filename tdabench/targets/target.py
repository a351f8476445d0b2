"""A target: the language model under study, with its tokenizer, checkpoints and loss.

The loss of an example is the mean token loss over its response (end-of-text token included),
given its prompt. It is the quantity that the truth records and that methods explain.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench import apart
from tdabench.data.examples import Example
from tdabench.errors import DataError, UsageError, first_line, unknown
from tdabench.io import (
    cache_folder,
    fingerprint,
    read_header,
    read_json,
    safetensors_bytes,
    sha256_kept,
    write_bytes,
    write_json,
)
from tdabench.limited import limited
from tdabench.seeds import named_seed
from tdabench.targets.batches import (
    Batch,
    Tokens,
    batch_places,
    out_of_memory,
    over_batches,
    pad,
)
from tdabench.targets.decoder import TOKENS, Decoder, States
from tdabench.targets.forward import input_rows, logits_at, way_of
from tdabench.targets.products import fast_products
from tdabench.targets.recipe import Recipe
from tdabench.targets.sizes import check_folder
from tdabench.targets.tokenizer import (
    INERT,
    PROBE,
    added_first,
    check_template,
    continuations,
    ids_of,
    load_tokenizer,
    reads_plainly,
    render_chat,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATES = {
    # name: (before the prompt, between prompt and response)
    "plain": ("Q: ", "\nA:"),
    "alpaca": ("### Instruction:\n", "\n\n### Response:\n"),
    "question": ("Question: ", "\nAnswer:"),
    "none": ("", ""),
    "chat": ("", ""),  # the tokenizer's own chat template, one user turn
    # As in the training of AirRep's published truth (its public code, sft_trainer.py): the first
    # 256 words between these two, inside the chat template.
    "airrep": ("Question: ", "\nAnswer:"),
}
CHAT = ("chat", "airrep")
TRUNCATIONS = ("error", "prompt-left", "right")
SPACED = ("plain", "question")  # templates after which the response begins with a space
DTYPES = ("float32", "float16", "bfloat16", "auto")
CHAT_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
READING_VERSION = 1  # raise it if the rule from text to tokens changes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt")

_WINDOW = 16_384  # examples tokenised at a time: a tokenizer's own output is many times as large

_USUAL = [Recipe().as_dict(), 0.25]  # not part of a fingerprint

SCRATCH = "scratch"  # in place of a checkpoint: weights initialised from the configuration


@dataclass(frozen=True)
class Target:
    """`folder` has config.json, tokenizer files and one safetensors file per checkpoint.

    `checkpoints` maps names to files in `folder` (or to folders in the Hugging Face layout) at
    which methods may score. None of them is among the models behind the truth. `regime` says
    whether the base model had seen the format of the fine-tuning data. `dtype` is the dtype in
    which methods score; "auto" is float32, or bfloat16 on an accelerator for models with more than
    a billion weights. Training is in float32. `source` is the origin of the folder, with its
    revision pinned; it has no effect.

    `recipe` is how the target is fine-tuned, and `fraction` the share of the pool that it is
    fine-tuned on. Truths are built with both, and methods that follow a training run follow them.
    """

    name: str
    folder: Path
    checkpoints: Mapping[str, str] = field(default_factory=lambda: {"base": "base.safetensors"})
    regime: str = ""
    template: str = "plain"
    max_length: int = 256
    truncate: str = "error"  # or "prompt-left": drops the prompt's first tokens; "right": the last
    dtype: str = "float32"
    source: str = ""
    recipe: Recipe = field(default_factory=Recipe)
    fraction: float = 0.25

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}", f"One of: {', '.join(DTYPES)}")
        if self.template not in TEMPLATES:
            raise unknown("template", self.template, TEMPLATES)
        if self.truncate not in TRUNCATIONS:
            raise UsageError(
                f"unknown truncation rule {self.truncate!r}", f"One of: {', '.join(TRUNCATIONS)}"
            )
        if not 0 < self.fraction <= 1:
            raise UsageError(f"fraction = {self.fraction}", "A share of the pool, in (0, 1]")
        if SCRATCH in self.checkpoints:
            raise UsageError(f"a checkpoint cannot be named {SCRATCH!r}", "It means: no checkpoint")

    def __hash__(self) -> int:
        return hash((self.name, self.folder))

    def __getstate__(self) -> dict[str, Any]:
        """Returns fields only: a worker process loads its own tokenizer and models."""
        return {f: self.__dict__[f] for f in self.__dataclass_fields__}

    # ------------------------------------------------------------------ identity

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all checkpoints, tokenizer, template, truncation rule, and how it is
        fine-tuned where that is not the default."""
        found = self._fingerprint(sorted(set(self.checkpoints.values())))
        training = [self.recipe.as_dict(), self.fraction]
        return found if training == _USUAL else fingerprint([found, training])

    def fingerprint_of(self, checkpoint: str) -> str:
        """Returns the fingerprint over one checkpoint, for truths that start there."""
        if checkpoint == SCRATCH:
            return self._fingerprint([])
        if checkpoint not in self.checkpoints:
            raise unknown(f"checkpoint of {self.name}", checkpoint, self.checkpoints)
        return self._fingerprint([self.checkpoints[checkpoint]])

    def _fingerprint(self, weights: Sequence[str]) -> str:
        there = [f for f in TOKENIZER_FILES if (self.folder / f).exists()]
        files = ["config.json", *(there[:1] or TOKENIZER_FILES[:1]), *weights]
        if there[:1] == ["vocab.json"]:
            files += there[1:]
        if self.template in CHAT:
            files += [f for f in CHAT_FILES if (self.folder / f).exists()]
        hashes = {}
        for f in files:
            path = self.folder / f
            inside = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            if not inside or not inside[0].exists():
                raise DataError(f"the target {self.name!r} lacks {path}")
            for p in inside:
                hashes[p.relative_to(self.folder).as_posix()] = sha256_kept(p)
        rest: list[Any] = [] if self.dtype == "float32" else [self.dtype]
        rest += [{"reading": self._reading}] if self._reading else []
        return fingerprint([hashes, self.template, self.max_length, self.truncate, *rest])

    @cached_property
    def _reading(self) -> str:
        """A digest of the token ids of fixed texts and of the tokenizer's settings.

        "" if tokenizer.json and the end of text in config.json, which are hashed, decide both.
        Measured once per state of the files and version of the libraries.
        """
        from importlib.metadata import version

        if self.template not in CHAT and reads_plainly(self.folder):
            return ""
        files = {
            f: sha256_kept(self.folder / f)
            for f in (*TOKENIZER_FILES, *SETTINGS, *CHAT_FILES, "config.json")
            if (self.folder / f).exists()
        }
        libraries = [version(name) for name in ("transformers", "tokenizers")]
        key = fingerprint([READING_VERSION, files, self.template, libraries])
        place = cache_folder() / "readings" / f"{key}.json"
        try:
            return str(read_json(place)["digest"])
        except (DataError, KeyError, TypeError):
            digest = self._read_apart() if apart.keeper is not None else self._read()
        with contextlib.suppress(DataError, UsageError, OSError):  # the cache may not be writable
            write_json(place, {"digest": digest})
        return digest

    def _read_apart(self) -> str:
        """Returns `_read` from a process with limits: an untrusted tokenizer may hang or crash."""
        about = {"name": self.name, "folder": str(self.folder), "template": self.template}
        found = limited(
            "tdabench.targets.target:reading_of", about, what=f"the tokenizer of {self.name!r}"
        )
        return str(found)

    def _read(self) -> str:
        settings: dict[str, Any] = {}
        for file in SETTINGS:
            if (self.folder / file).exists():
                found = read_json(self.folder / file)
                kept = {k: v for k, v in found.items() if k not in INERT}
                settings |= {file: kept} if kept else {}
        added = sorted(self.tokenizer.get_added_vocab())
        texts = [*PROBE, *((f"a{t}b {t} c", f"{t}d") for t in added[:512])]
        examples = [Example(str(i), p, r) for i, (p, r) in enumerate(texts)]
        pieces = self._pieces(examples)
        if not settings and self.template not in CHAT and pieces == self._plain_pieces(examples):
            return ""
        return fingerprint([settings, pieces])

    def _plain_pieces(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """Returns `_pieces` as tokenizer.json and config.json alone define them, or []."""
        from tokenizers import Tokenizer

        end = read_json(self.folder / "config.json").get("eos_token_id")
        if type(end) is not int or not (self.folder / "tokenizer.json").exists():
            return []
        raw = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        raw.no_truncation()
        raw.no_padding()

        def ids(text: str) -> list[int]:
            return list(raw.encode(text, add_special_tokens=False).ids)

        return [
            (ids(self.prompt_text(e)) or [end], [*ids(self._response_text(e)), end])
            for e in examples
        ]

    def describe(self) -> dict[str, Any]:
        """Returns a record's description of the target, without its fingerprint."""
        return {
            "name": self.name,
            "regime": self.regime,
            "source": self.source,
            "template": self.template,
            "max_length": self.max_length,
            "truncate": self.truncate,
            "dtype": self.dtype,
            "recipe": self.recipe.as_dict(),
            "fraction": self.fraction,
        }

    def files(self, checkpoint: str) -> list[Path]:
        """Lists the files for training from `checkpoint`: configuration, tokenizer, weights."""
        small = {".json", ".txt", ".model", ".jinja"}
        out = [p for p in sorted(self.folder.iterdir()) if p.is_file() and p.suffix in small]
        if checkpoint != SCRATCH:
            path = self.folder / self.checkpoints[checkpoint]
            out += [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
        return out

    # ------------------------------------------------------------------ models

    @cached_property
    def _models(self) -> dict[tuple[str, str], PreTrainedModel]:
        return {}

    def model(self, checkpoint: str = "base", device: str = "cpu") -> PreTrainedModel:
        """Returns the shared model at `checkpoint` in eval mode, gradients off; do not change it.

        Its dtype is `dtype`, by default float32.
        """
        if (checkpoint, device) not in self._models:
            model = self.fresh_model(checkpoint)
            model.to(device, dtype_on(self.dtype, device, model))  # type: ignore[arg-type]
            self._models[checkpoint, device] = model
        return self._models[checkpoint, device]

    def fresh_model(self, checkpoint: str = "base", seed: int = 0) -> PreTrainedModel:
        """Returns a new copy of the model at `checkpoint` in float32, for the caller to train.

        "scratch" is not a file: weights are initialised from the configuration with `seed`.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if checkpoint != SCRATCH and checkpoint not in self.checkpoints:
            raise unknown(f"checkpoint of {self.name}", checkpoint, self.checkpoints)
        path = self.folder / self.checkpoints.get(checkpoint, "")
        if checkpoint != SCRATCH and path.is_dir():
            model = load_pretrained(path)
        else:
            try:
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            except Exception as e:  # what it raises depends on what is wrong
                raise DataError(f"{self.folder}/config.json cannot be used: {first_line(e)}") from e
            if checkpoint != SCRATCH:
                check_folder(path, config)
            with torch.random.fork_rng(devices=[]):  # must not advance global streams
                torch.manual_seed(named_seed(seed, SCRATCH))
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if checkpoint != SCRATCH:
                load_weights(model, path)
        model.eval().requires_grad_(False)
        model.config.use_cache = False
        self._check(model)
        return model

    def _check(self, model: PreTrainedModel) -> None:
        """Raises DataError if the tokenizer does not fit the model, or the model is not causal."""
        rows, most = input_rows(model), max(self.tokenizer.get_vocab().values(), default=0)
        if most >= rows:
            raise DataError(
                f"the tokenizer of {self.name!r} has ids up to {most:,}, the model has "
                f"{rows:,} rows of embeddings",
                "Is it this model's tokenizer? If tokens were added to it, resize the model's "
                "embeddings and save it again",
            )
        way_of(model)

    # ------------------------------------------------------------------ tokens

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.folder, self.name)
        if self.template in CHAT:
            with self._template_errors("any text"):
                check_template(tokenizer, self.name)
        return tokenizer

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def prompt_text(self, example: Example) -> str:
        """Returns the prompt as the model sees it, up to the beginning of the response."""
        before, between = TEMPLATES[self.template]
        prompt = example.prompt
        if self.template == "airrep":
            prompt = " ".join(prompt.split()[:256])
        prompt = f"{before}{prompt}{between}"
        return self._chat([("user", prompt)], example.id) if self.template in CHAT else prompt

    def _chat(self, turns: Sequence[tuple[str, str]], id: str) -> str:
        """Formats a conversation with the tokenizer's chat template."""
        with self._template_errors(repr(id)):
            return render_chat(self.tokenizer, turns)

    @contextlib.contextmanager
    def _template_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as e:  # a template is a program and may raise anything
            raise DataError(
                f"the chat template of {self.name!r} fails on {what}: {first_line(e)}",
                'Use another template: "plain", "alpaca", "question" or "none"',
            ) from e

    @cached_property
    def _ending(self) -> list[int]:
        """Token ids that end a response: end of text, or the ending of the chat template."""
        eos = [int(self.tokenizer.eos_token_id)]
        if self.template not in CHAT:
            return eos
        asked, said = self._chat([("user", "a")], ""), "b"
        whole = self._chat([("user", "a"), ("assistant", said)], "")
        rest = whole.removeprefix(asked + said)
        return eos if rest == whole else ids_of(self.tokenizer, [rest])[0] or eos

    def tokenize(self, examples: Sequence[Example], role: str = "full") -> list[Tokens]:
        """Tokenises each example. `role="prompt"` leaves out the response.

        Raises DataError for an example longer than the context if truncation is "error".
        """
        out: list[Tokens] = []
        for a in range(0, len(examples), _WINDOW):
            out += self._tokenized(examples[a : a + _WINDOW], role)
        return out

    def _tokenized(self, examples: Sequence[Example], role: str) -> list[Tokens]:
        out = []
        for example, (p, r) in zip(examples, self._pieces(examples, role)):
            if len(p) + len(r) > self.max_length:
                p, r = self._truncated(example, p, r)
            out.append(Tokens(np.asarray(p + r, dtype=np.int64), len(p)))
        return out

    @cached_property
    def _beginning(self) -> list[int]:
        """Token ids before a prompt: the beginning of text; chat templates contain their own."""
        return [] if self.template in CHAT else added_first(self.tokenizer)

    def _pieces(
        self, examples: Sequence[Example], role: str = "full"
    ) -> list[tuple[list[int], list[int]]]:
        """Returns the token ids of each prompt and each response before truncation."""
        p_ids = ids_of(self.tokenizer, [self.prompt_text(e) for e in examples])
        r_ids = continuations(self.tokenizer, [self._response_text(e) for e in examples])
        end = self._ending
        # A token must precede the first predicted one.
        empty = self._beginning or [int(self.tokenizer.eos_token_id)]
        prompts = [[*self._beginning, *p] if p else empty for p in p_ids]
        return [(p, [*r, *end] if role == "full" else []) for p, r in zip(prompts, r_ids)]

    def _response_text(self, example: Example) -> str:
        return (" " if self.template in SPACED else "") + example.response

    def apart(self, examples: Sequence[Example]) -> int:
        """Counts examples whose tokens differ if prompt and response are tokenised as one text."""
        asked = [(e, prompt) for e in examples if (prompt := self.prompt_text(e))]
        whole = ids_of(self.tokenizer, [prompt + self._response_text(e) for e, prompt in asked])
        start, end = len(self._beginning), len(self._ending)
        pieces = self._pieces([e for e, _ in asked])
        return sum([*p[start:], *r[: len(r) - end]] != one for (p, r), one in zip(pieces, whole))

    def _truncated(self, example: Example, p: list[int], r: list[int]) -> tuple[list, list]:
        if self.truncate == "error":
            raise DataError(
                f"example {example.id!r} has {len(p) + len(r)} tokens, more than the "
                f"{self.max_length} that {self.name} reads",
                "Shorten it, or cut prompts on the left: --truncate prompt-left (in a suite: "
                'truncate = "prompt-left" for the target)',
            )
        if self.truncate == "right" and len(p) < self.max_length:
            return p, r[: self.max_length - len(p)]
        first = self._beginning if len(self._beginning) < len(p) else []
        r = r[: self.max_length - 1 - len(first)]
        return [*first, *p[len(p) - (self.max_length - len(r) - len(first)) :]], r

    def batches(
        self, tokens: Sequence[Tokens], tokens_a_batch: int = 4096, max_examples: int = 256
    ) -> Iterator[Batch]:
        """Yields batches of similar length, longest first, at most `tokens_a_batch` padded."""
        for index in batch_places([len(t) for t in tokens], tokens_a_batch, max_examples):
            yield pad(tokens, index, self.pad_id)

    def losses(
        self,
        model: PreTrainedModel,
        tokens: Sequence[Tokens],
        tokens_a_batch: int = 8192,
        below: States | None = None,
    ) -> np.ndarray:
        """Computes each example's mean response-token loss in eval mode: float32 [n].

        `below` are the states of `tokens` that enter a layer (`states_below`), if the layers below
        it are the base's. When memory runs out the batch is halved for the rest of the call.
        """
        import torch

        written = Decoder.of(model, max(map(len, tokens), default=0))
        if written:
            tokens_a_batch = min(tokens_a_batch, TOKENS)

        def compute(index: np.ndarray) -> np.ndarray:
            batch = pad(tokens, index, self.pad_id).to(str(model.device))
            with torch.inference_mode():
                if written:
                    return written.losses(batch, below).numpy()
                with fast_products(model, batch.input_ids.shape[1]):
                    return example_losses(model, batch).cpu().numpy()

        out = np.empty(len(tokens), dtype=np.float32)
        training = model.training
        model.eval()
        try:
            for index, found in over_batches([len(t) for t in tokens], compute, tokens_a_batch):
                out[index] = found
        finally:
            model.train(training)
        return out


def reading_of(name: str, folder: str, template: str) -> str:
    """Returns how the tokenizer in `folder` reads; for a process with limits. See `_reading`."""
    return Target(name, Path(folder), template=template)._read()


def dtype_on(dtype: str, device: str, model: PreTrainedModel) -> torch.dtype:
    """Returns the torch dtype that a target's `dtype` means for a model on a device."""
    import torch

    if dtype == "auto":
        large = sum(p.numel() for p in model.parameters()) > 1_000_000_000
        dtype = "bfloat16" if large and not device.startswith("cpu") else "float32"
    return getattr(torch, dtype)


def load_pretrained(folder: Path) -> PreTrainedModel:
    """Loads the causal model from a folder in the Hugging Face layout, float32, safetensors only.

    Raises DataError if weights are missing, which transformers would initialise at random.
    """
    model, report = _loaded(folder, body=False)
    check_report(folder, report)
    return model


def load_body(folder: Path) -> PreTrainedModel:
    """Loads the model in a folder without head and pooler, float32, eval mode.

    Raises DataError when the folder lacks any of its weights, which transformers would draw at
    random, or holds others of the same parts (such as more layers).
    """
    model, report = _loaded(folder, body=True)
    parts = {name for name, _ in model.named_children()} - {"pooler"}
    own = {k for k in report["unexpected_keys"] if str(k).partition(".")[0] in parts}
    lacking = {k for k in report["missing_keys"] if not str(k).startswith("pooler.")}
    check_report(folder, {**report, "missing_keys": lacking, "unexpected_keys": own})
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.eval()


def _loaded(folder: Path, body: bool) -> tuple[Any, Mapping[str, Any]]:
    """Returns a causal model, or its `body`, and what transformers reports about its weights.

    Nothing is fetched, unpickled or run. Raises DataError for a folder that cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_folder(folder, config, body=body)
        kind: Any = AutoModel if body else AutoModelForCausalLM
        with no_bars(), torch.random.fork_rng(devices=[]):
            model, report = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as e:
        # What transformers raises for a damaged folder depends on what is damaged.
        if out_of_memory(e) or isinstance(e, DataError):
            raise
        what = "an encoder" if body else "a causal language model"
        raise DataError(
            f"cannot load {what} from {folder}: {first_line(e)}",
            "It needs a config.json that transformers supports and weights as safetensors "
            "(pytorch_model.bin is a pickle, which is not read)",
        ) from e
    return model, report


def check_report(where: Path, report: Mapping[str, Any], tied: str = "") -> None:
    """Raises DataError when what transformers loaded is not the whole of `where` and no more.

    What a file lacks it draws at random, and what the configuration has no place for it leaves
    out: both with no more than a warning.
    """
    lacking = [k for k in sorted(report["missing_keys"]) if k != tied]
    shaped = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report["mismatched_keys"])
    if lacking or shaped:
        odd = lacking + shaped
        raise DataError(
            f"{where} lacks {len(odd)} of the model's weights or shapes them otherwise, "
            f"first {odd[0]}",
            "Is it a causal language model, and did the download finish?",
        )
    surplus = sorted(report["unexpected_keys"])
    if surplus:
        raise DataError(
            f"{where} holds {len(surplus)} weights that its configuration has no place for, "
            f"first {surplus[0]}",
            "config.json and weights are of different models",
        )


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Suppresses transformers' progress bars on stderr, which in a log are one line per tensor."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # some bars ignore the setting
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def response_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Computes logits at the positions that predict response tokens: [tokens, vocabulary].

    Other positions are skipped: with a large vocabulary they take most of the memory, and with
    short responses much of the time.
    """
    return logits_at(model, batch.input_ids, batch.attention_mask, batch.places)


def token_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Computes the losses of the response tokens, row by row: [tokens]."""
    import torch

    logits = response_logits(model, batch)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float64 stays
    return torch.nn.functional.cross_entropy(logits, batch.gold, reduction="none")


def example_losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Computes each example's mean response-token loss, differentiable: [b]."""
    return batch.means(token_losses(model, batch))


def tied_head(model: PreTrainedModel) -> str:
    """Returns the name of an output matrix that is tied to the input embedding, or ""."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return ""
    head = model.get_output_embeddings()
    return next((f"{n}.weight" for n, m in model.named_modules() if m is head), "")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads tensors by name. Raises DataError for a missing or truncated file before allocating."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as e:
        raise DataError(f"{path} is truncated or not a safetensors file: {e}") from e


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Loads a safetensors file into `model` (tied tensors may be absent), checking names."""
    state = read_weights(path)
    mine = model.state_dict()
    for name, value in state.items():
        if name in mine and mine[name].shape != value.shape:
            raise DataError(
                f"{path} does not fit the model's configuration: {name} is "
                f"{list(value.shape)}, not {list(mine[name].shape)}"
            )
    outcome = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    model.tie_weights()
    tied = tied_head(model)
    missing = [k for k in outcome.missing_keys if k != tied]
    if outcome.unexpected_keys or missing:
        odd = (missing + list(outcome.unexpected_keys))[:3]
        raise DataError(f"{path} does not fit the model's configuration: {', '.join(odd)}")


def save_weights(model: PreTrainedModel, path: Path, half: bool = True) -> None:
    """Writes the weights as float16; the rounded weights are the checkpoint."""
    import torch

    tied = tied_head(model)
    state = {k: v for k, v in model.state_dict().items() if k != tied}
    dtype = torch.float16 if half else torch.float32
    arrays = {k: v.detach().to("cpu", dtype).numpy() for k, v in state.items()}
    write_bytes(path, safetensors_bytes(arrays, {"format": "pt"}))
