"""A world small enough to build in a second: corpus, queries and a language model, offline.

The conformance kit runs on it; a plugin's own tests can use it, too.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.errors import unknown
from tdabench.method import Context
from tdabench.targets.target import Target

END = "<|endoftext|>"
WORDS = "amber birch cedar delta ember fjord grove heron iris jade kelp lotus maple north".split()
ARCHITECTURES = ("qwen2", "llama", "gpt2", "gpt_neox")


@dataclass(frozen=True)
class TinyWorld:
    """A small world: `target` has about 30,000 weights and the checkpoints base and warm.

    There are 36 examples in `train` and 8 in `queries`, of four tasks; no example is in both."""

    target: Target
    train: Corpus
    queries: Corpus
    assets: Mapping[str, Path] = field(default_factory=dict)

    def context(self, scratch: Path, seed: int = 0) -> Context:
        """Returns a context like the harness's for a method that writes in `scratch`.

        The target is a fresh copy, so that a method that damages its models affects only its own.
        """
        return Context(target=replace(self.target), scratch=scratch, seed=seed, assets=self.assets)


def tiny_corpus(n: int = 36, seed: int = 0, prefix: str = "t") -> Corpus:
    """Returns `n` examples of four tasks, of different lengths, some not ASCII; ids `t000`, …"""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        words = [str(w) for w in rng.choice(WORDS, size=rng.integers(1, 7))]
        a, b = (int(v) for v in rng.integers(0, 99, size=2))
        task, prompt, response = (
            ("copy", f"Copy: {' '.join(words)} {a}", f"{' '.join(words)} {a}"),
            ("reverse", f"Reverse: {' '.join(words)} {a}", " ".join([str(a), *reversed(words)])),
            ("add", f"What is {a} plus {b}?", str(a + b)),
            ("count", f"Wie viele Wörter: {' '.join(words)}?", f"Es sind {len(words)} – {a}."),
        )[i % 4]
        examples.append(Example(f"{prefix}{i:03d}", prompt, response, task))
    return Corpus(examples, "tiny")


@lru_cache
def tiny_world(architecture: str = "qwen2") -> TinyWorld:
    """Returns the world, made once per process and removed at its end; always the same numbers."""
    folder = Path(tempfile.mkdtemp(prefix="tdabench-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train, queries = tiny_corpus(), tiny_corpus(8, seed=1, prefix="q")
    return TinyWorld(tiny_target(folder, train, architecture), train, queries)


def tiny_suite(folder: Path, world: TinyWorld | None = None) -> Path:
    """Writes the world as a suite into `folder`, with a truth of twelve retrained models.

    Returns the path of its suite.toml: `tdabench run --suite PATH` takes seconds.
    """
    import json

    from tdabench.groups import Groups
    from tdabench.targets.recipe import Recipe
    from tdabench.targets.training import finetune
    from tdabench.truth.store import Truth

    world = world or tiny_world()
    target, folder = world.target, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(target.folder, folder / "target", dirs_exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as f:
        for split, corpus in (("train", world.train), ("test", world.queries)):
            for e in corpus:
                row = {k: getattr(e, k) for k in ("id", "prompt", "response", "task")}
                f.write(json.dumps({**row, "split": split}, ensure_ascii=False) + "\n")

    groups = Groups.random(12, len(world.train), 0.5, np.random.default_rng(0))
    train, queries = target.tokenize(world.train), target.tokenize(world.queries)
    losses = np.empty((len(groups), 1, len(queries)), dtype=np.float32)
    recipe = Recipe(lr=3e-3, epochs=4, batch_size=6)
    for g, members in enumerate(groups):
        model = target.fresh_model("base")
        finetune(model, [train[i] for i in members], recipe, 0, target.pad_id)
        losses[g, 0] = target.losses(model, queries)
    plan = {"name": "tiny", "train": world.train.fingerprint}
    Truth(losses, groups, tuple(world.queries.ids), plan).save(folder / "truth.safetensors")

    checkpoints = ", ".join(f'{k} = "{v}"' for k, v in target.checkpoints.items())
    path = folder / "suite.toml"
    path.write_text(
        f"""[suite]
name = "tiny"
version = 1
summary = "a two-layer model and 36 examples, for trying out a plugin"

[corpus]
file = "corpus.jsonl"
train = "train"
queries = "test"

[[targets]]
label = "tiny"
name = "{target.name}"
folder = "target"
checkpoints = {{ {checkpoints} }}
regime = "{target.regime}"
max_length = {target.max_length}

[targets.truths]
lds = "truth.safetensors"

[benchmarks]
default = ["lds"]
"""
    )
    return path


def tiny_target(folder: Path, corpus: Corpus, architecture: str = "qwen2") -> Target:
    """Writes a two-layer language model of that architecture, trained briefly on `corpus`.

    Raises UsageError for an architecture that is not one of `ARCHITECTURES`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
    )

    from tdabench.targets.recipe import Recipe
    from tdabench.targets.target import save_weights
    from tdabench.targets.training import finetune

    if architecture not in ARCHITECTURES:
        raise unknown("architecture of the tiny target", architecture, ARCHITECTURES)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([e.text for e in corpus], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)

    vocabulary = tokenizer.get_vocab_size()
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        **ends,
    }
    config = {
        "qwen2": lambda: Qwen2Config(**common, num_key_value_heads=2, tie_word_embeddings=True),
        "llama": lambda: LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=False),
        "gpt_neox": lambda: GPTNeoXConfig(**common),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends
        ),
    }[architecture]()
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name and "wte" not in name:
            p.data.mul_(3.0)  # at the default scale layers are near-linear and losses near-equal
    save_weights(model, folder / "base.safetensors")
    target = Target(
        name=f"tiny-{architecture}",
        folder=folder,
        checkpoints={"base": "base.safetensors", "warm": "warm.safetensors"},
        regime="cold",
        max_length=128,
    )
    warm = target.fresh_model("base")
    recipe = Recipe(lr=3e-3, epochs=2, batch_size=12)
    finetune(warm, target.tokenize(corpus), recipe, 0, target.pad_id)
    save_weights(warm, folder / "warm.safetensors")
    return target
