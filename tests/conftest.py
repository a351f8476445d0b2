"""Fixtures for every test: a tiny corpus, and tiny targets built from a configuration.

`tiny_corpus` (60 examples, 4 tasks) and `tiny_queries` (12) share no example; `tiny_target` is a
two-layer Qwen2 with the checkpoints "base" and "warm"; `make_target(architecture)` gives the same
for another family. All are deterministic, and made once a session.
"""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several workers may share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tdabench.data.examples import Corpus, Example
from tdabench.method import Context
from tdabench.targets.target import Target

END = "<|endoftext|>"  # Qwen2 tokenizers add this token, beyond the vocabulary, unless present
WORDS = "amber birch cedar delta ember fjord grove heron iris jade kelp lotus maple north".split()


def _examples(n: int, seed: int, prefix: str) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        task = ("copy", "reverse", "add", "count")[i % 4]
        words = [str(w) for w in rng.choice(WORDS, size=rng.integers(1, 5))]
        a, b = (int(v) for v in rng.integers(0, 50, size=2))
        prompt, response = {
            "copy": (f"Copy: {' '.join(words)}", " ".join(words)),
            "reverse": (f"Reverse: {' '.join(words)}", " ".join(reversed(words))),
            "add": (f"What is {a} plus {b}?", str(a + b)),
            "count": (f"How many words: {' '.join(words)}", f"There are {len(words)}."),
        }[task]
        out.append(Example(f"{prefix}{i:03d}", prompt, response, task))
    return out


@pytest.fixture(scope="session")
def tiny_corpus() -> Corpus:
    return Corpus(_examples(60, 0, "t"), "tiny")


@pytest.fixture(scope="session")
def tiny_queries() -> Corpus:
    return Corpus(_examples(12, 1, "q"), "tiny-queries")


def _config(architecture: str, vocabulary: int):  # type: ignore[no-untyped-def]
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        **ends,
    }
    if architecture == "qwen2":
        return Qwen2Config(**common, num_key_value_heads=2, tie_word_embeddings=True)
    if architecture == "llama":
        return LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=False)
    if architecture == "gpt_neox":
        return GPTNeoXConfig(**common)
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends
        )
    raise ValueError(architecture)


def build_target(folder: Path, corpus: Corpus, architecture: str = "qwen2") -> Target:
    """Writes a target of about 30,000 weights into `folder`, checkpoints base and warm."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from tdabench.targets.recipe import Recipe
    from tdabench.targets.target import save_weights
    from tdabench.targets.training import finetune

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

    config = _config(architecture, tokenizer.get_vocab_size())
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
    tokens = target.tokenize(corpus)
    finetune(warm, tokens, Recipe(lr=3e-3, epochs=2, batch_size=10), 0, target.pad_id)
    save_weights(warm, folder / "warm.safetensors")
    return target


@pytest.fixture(scope="session")
def make_target(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus
) -> Callable[[str], Target]:
    """A function from an architecture (qwen2, llama, gpt2, gpt_neox) to its tiny target."""
    made: dict[str, Target] = {}

    def make(architecture: str = "qwen2") -> Target:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(f"target-{architecture}")
            made[architecture] = build_target(folder, tiny_corpus, architecture)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def tiny_target(make_target: Callable[[str], Target]) -> Target:
    return make_target("qwen2")


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verdicts on models that were vetted by any test, and the secret that they are sealed by.

    Vetting takes seconds, and most tests of models have a copy of the same one.
    """
    folder = tmp_path_factory.mktemp("verdicts")
    (folder / "vetted").mkdir()
    (folder / "secret").write_bytes(bytes(range(32)))
    (folder / "secret").chmod(0o600)
    return folder


@pytest.fixture
def own_cache(verdicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, which knows the models that other tests vetted."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "vetted").symlink_to(verdicts / "vetted")
    shutil.copy(verdicts / "secret", cache / "secret")
    monkeypatch.setenv("TDABENCH_CACHE", str(cache))
    return cache


@pytest.fixture
def tiny_context(tiny_target: Target, tmp_path: Path) -> Context:
    return Context(target=tiny_target, scratch=tmp_path)
