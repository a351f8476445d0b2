"""Makes the pocket targets: tokenizer, base checkpoints by pretraining, warmed-up checkpoints.

    python -m tools.pocket.make_targets instruct continued [--out DIR]
    python -m tools.pocket.make_targets llama gpt2 neox large

A regime is what the base model has seen before fine-tuning. `instruct`: declarative text only,
never the instruction format (the paper's setting). `continued`: the same text plus examples in
the instruction format. `warm` is the base fine-tuned on the `warmup` split, which is disjoint
from the pool, by the recipe of the truth: gradient methods may score there. The four others
read the same text with the same tokenizer and are there for their truths (the transfer
benchmark): they have a base only.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data import read_jsonl
from tdabench.io import write_json, write_text
from tdabench.seeds import named_seed
from tdabench.targets.batches import Tokens
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import TEMPLATES, Target, save_weights
from tdabench.targets.training import finetune
from tools.pocket import CORPUS, SUITE

VOCABULARY = 1024
CONTEXT = 128

# How every model of a pocket truth is trained; also how `warm` is made from `base`.
TRUTH_RECIPE = Recipe(lr=1e-3, epochs=2, batch_size=32)

# About one million parameters each; the head is tied to the embedding.
QWEN2_1M: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
}


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
}
GPT2: dict[str, Any] = {  # learned positions, LayerNorm, a plain MLP; dropout off, as elsewhere
    "model_type": "gpt2",
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
NEOX: dict[str, Any] = {  # parallel attention and MLP, partial rotary positions
    "model_type": "gpt_neox",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
QWEN2_LARGE: dict[str, Any] = {
    **QWEN2_1M,
    "hidden_size": 160,
    "intermediate_size": 512,
}


@dataclass(frozen=True)
class Pretraining:
    """Next-token prediction on packed rows of `context` tokens."""

    architecture: dict[str, Any]
    regime: str = "instruct"
    warm: bool = False  # whether a warmed-up checkpoint is made, too
    instruct_share: int = 0  # how many times the pretrain_instruct split is seen per epoch
    epochs: int = 4
    batch_rows: int = 16
    lr: float = 2e-3
    seed: int = 0
    vocabulary: int = VOCABULARY
    context: int = CONTEXT


TARGETS = {
    "instruct": Pretraining(QWEN2_1M, warm=True),
    "continued": Pretraining(QWEN2_1M, "continued", warm=True, instruct_share=1),
    "llama": Pretraining(LLAMA, epochs=1),
    "gpt2": Pretraining(GPT2, epochs=1),
    "neox": Pretraining(NEOX, epochs=2),
    "large": Pretraining(QWEN2_LARGE, epochs=1),
}


def make_tokenizer(texts: list[str], folder: Path, plan: Pretraining) -> None:
    """A byte-level BPE of `plan.vocabulary` entries, deterministic given the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),  # as Qwen2 does: sums stay learnable
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "model_max_length": plan.context,
            "clean_up_tokenization_spaces": False,
        },
    )


def make_config(plan: Pretraining, folder: Path) -> None:
    from transformers import AutoConfig

    model_type = plan.architecture["model_type"]
    rest = {k: v for k, v in plan.architecture.items() if k != "model_type"}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=plan.vocabulary,
        max_position_embeddings=plan.context * 2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
        **rest,
    )
    config.save_pretrained(folder)


def pretraining_rows(target: Target, plan: Pretraining, corpus_path: Path) -> np.ndarray:
    """Token ids [row, context]: documents separated by end-of-text, packed."""
    texts = [e.response for e in read_jsonl(corpus_path, "pretrain_text")]
    if plan.instruct_share:
        before, between = TEMPLATES["plain"]
        seen = read_jsonl(corpus_path, "pretrain_instruct")
        texts += [f"{before}{e.prompt}{between} {e.response}" for e in seen] * plan.instruct_share
    order = np.random.default_rng(named_seed(plan.seed, "documents")).permutation(len(texts))
    eos = int(target.tokenizer.eos_token_id)
    encoded = target.tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
    stream = np.concatenate([[eos, *ids] for ids in encoded]).astype(np.int64)
    return stream[: len(stream) // plan.context * plan.context].reshape(-1, plan.context)


def pretrain(target: Target, plan: Pretraining, corpus_path: Path = CORPUS) -> Any:
    """A model trained from scratch by `plan`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = pretraining_rows(target, plan, corpus_path)
    torch.manual_seed(named_seed(plan.seed, "init"))
    config = AutoConfig.from_pretrained(target.folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    recipe = Recipe(
        lr=plan.lr,
        epochs=plan.epochs,
        batch_size=plan.batch_rows,
        warmup=0.05,
        weight_decay=0.1,
        beta2=0.95,
    )
    tokens = [Tokens(row, 1) for row in rows]
    began = time.perf_counter()
    n_params = sum(p.numel() for p in model.parameters())
    say(f"{target.name}: {n_params:,} parameters, {rows.size:,} tokens x {plan.epochs}")

    def on_step(step: int, total: int, loss: float) -> None:
        if step % 100 == 0 or step == total:
            seconds = time.perf_counter() - began
            say(f"  step {step}/{total} loss {loss:.3f} {seconds:.0f} s")

    return finetune(
        model, tokens, recipe, named_seed(plan.seed, "pretrain"), target.pad_id, on_step
    )


def make(label: str, out: Path, corpus_path: Path = CORPUS) -> None:
    """Tokenizer and checkpoints of one target, written under `out/label`."""
    folder = out / label
    folder.mkdir(parents=True, exist_ok=True)
    plan = TARGETS[label]
    texts = [e.response for e in read_jsonl(corpus_path, "pretrain_text")]
    texts += [e.text for e in read_jsonl(corpus_path, "pretrain_instruct")]
    make_tokenizer(texts, folder, plan)
    make_config(plan, folder)
    target = Target(
        label,
        folder,
        {"base": "base.safetensors", "warm": "warm.safetensors"},
        regime=plan.regime,
        max_length=CONTEXT,
    )
    save_weights(pretrain(target, plan, corpus_path), folder / "base.safetensors")
    if not plan.warm:
        return

    warmup = read_jsonl(corpus_path, "warmup")
    model = target.fresh_model("base")
    probe = read_jsonl(corpus_path, "tuning")
    tokens = target.tokenize(probe)
    before = target.losses(model, tokens).mean()
    seed = named_seed(plan.seed, "warmup")
    finetune(model, target.tokenize(warmup), TRUTH_RECIPE, seed, target.pad_id)
    say(
        f"{label}: tuning-query loss {before:.3f} at base, "
        f"{target.losses(model, tokens).mean():.3f} at warm"
    )
    save_weights(model, folder / "warm.safetensors")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--out", type=Path, default=SUITE / "targets")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for label in args.labels:
        make(label, args.out, args.corpus)


if __name__ == "__main__":
    main()
