"""Makes the small target of `factbook`: tokenizer and base, and `warm` where methods may score.

    python -m tools.factbook.make_target [--suite FOLDER]

The model has the architecture of pocket's main target at half the width, with two layers and a
larger vocabulary: a retraining takes two seconds. The base reads profiles of countries that have no
training passage, as plain text. `warm` is the base fine-tuned on passages and questions of other
countries by the recipe of the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tdabench.data import read_jsonl
from tdabench.seeds import named_seed
from tdabench.targets.target import Target, save_weights
from tdabench.targets.training import finetune
from tools.factbook import CORPUS, SUITE
from tools.pocket.make_targets import (
    QWEN2_1M,
    Pretraining,
    make_config,
    make_tokenizer,
    pretrain,
    say,
)

ARCHITECTURE = {
    **QWEN2_1M,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
}
PLAN = Pretraining(ARCHITECTURE, epochs=3, vocabulary=2048, context=192, lr=4e-3)
WARM = 317  # examples of the label pool: as many as a group of the truth has


def make(folder: Path, corpus: Path) -> None:
    """Writes tokenizer, configuration, base and warm weights into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer([e.response for e in read_jsonl(corpus, "pretrain_text")], folder, PLAN)
    make_config(PLAN, folder)
    checkpoints = {"base": "base.safetensors"}
    target = Target("small", folder, checkpoints, max_length=PLAN.context)
    save_weights(pretrain(target, PLAN, corpus), folder / "base.safetensors")


def warm(target: Target, corpus: Path) -> None:
    """Fine-tunes the base on as many examples of other countries as a group of the truth has."""
    recipe, probe = target.recipe, target.tokenize(read_jsonl(corpus, "tuning"))
    other = list(read_jsonl(corpus, "labels_pool"))[:WARM]
    model = target.fresh_model("base")
    before = target.losses(model, probe).mean()
    tokens = target.tokenize(other)
    finetune(model, tokens, recipe, named_seed(PLAN.seed, "warmup"), target.pad_id)
    after = target.losses(model, probe).mean()
    say(f"tuning-query loss {before:.3f} at base, {after:.3f} at warm")
    save_weights(model, target.folder / "warm.safetensors")


def main() -> None:
    import torch

    from tdabench.run.sources import load_suite

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, default=SUITE, help="folder of the suite")
    parser.add_argument("--only-warm", action="store_true", help="after a change of the recipe")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.only_warm:
        make(args.suite / "targets" / "small", args.suite / CORPUS.name)
    warm(load_suite(args.suite / "suite.toml").target("small").target, args.suite / CORPUS.name)


if __name__ == "__main__":
    main()
