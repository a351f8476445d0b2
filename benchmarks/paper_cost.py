"""Cost of AirRep and LoGra on the architectures of the paper, with random weights.

    OMP_NUM_THREADS=1 python benchmarks/paper_cost.py [--examples 2] [--tokens 256]
    python benchmarks/paper_cost.py --examples 32 --rounds 5 --dtype bfloat16   # on a GPU

The target is a Qwen2.5-0.5B, the encoder a GTE-small with AirRep's projection (arXiv 2505.18513),
both initialised at random from their published configurations: time and bytes do not depend on the
weights. LoGra uses the MLP layers at rank 16 (18,432 dimensions) and rank 4 (1,152), the paper's
two settings. Both read the same numbers of tokens; a quarter of each example is response. On a CPU,
time is the process's own, which other processes do not distort; on an accelerator it is wall time.
Bytes are the size of a feature store on disk. `--json FILE` writes times and bytes there; `--tiny`
takes small models instead, to try the script out.

These figures exclude AirRep's one-time preparation (retraining and encoder training), which
`tdabench show airrep` reports; docs/benchmarks/cost.md has the break-even.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tdabench_airrep.encoder import Encoder, TextFormat
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM

from tdabench.method import Context
from tdabench.targets.batches import Tokens, pad
from tdabench.targets.target import Target, example_losses
from tdabench.toolkit.gradients import GradientEngine
from tdabench.toolkit.store import FeatureStore

PUBLISHED = "about 80 times faster and 48 times smaller than gradient methods of like quality"
MLP = r"mlp\.(gate|up|down)_proj$"


def qwen_config() -> Qwen2Config:
    """Qwen2.5-0.5B: 494 million weights, 358 of them outside the embeddings."""
    return Qwen2Config(
        vocab_size=151_936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


def tiny_config() -> Qwen2Config:
    """The same architecture with 2 layers of 32."""
    return Qwen2Config(
        vocab_size=30_522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


def qwen(device: str, tiny: bool = False) -> Qwen2ForCausalLM:
    config = tiny_config() if tiny else qwen_config()
    return Qwen2ForCausalLM(config).eval().requires_grad_(False).to(device)


def gte(device: str, layers: int = 12) -> Encoder:
    """GTE-small with a 384 to 384 projection."""
    config = BertConfig(
        vocab_size=30_522, hidden_size=384, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=512,
    )  # fmt: skip
    body = BertModel(config, add_pooling_layer=False)
    tokenizer = None  # ids are given, with the same number of tokens for both
    return Encoder(body, 384, tokenizer, TextFormat()).requires_grad_(False).to(device)  # type: ignore[arg-type]


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object], device: str, rounds: int) -> float:
    """Returns the best of `rounds`, after a warm-up round."""
    work()
    best = float("inf")
    for _ in range(rounds):
        start = clock(device)
        work()
        best = min(best, clock(device) - start)
    return best


def stored_bytes(dim: int, n: int, dtype: str) -> float:
    """Returns bytes per example of a feature store with `n` rows on disk."""
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.create(Path(folder) / "rows", n, dim, dtype)
        store.write(np.arange(n), np.ones((n, dim), np.float32))
        store.close()
        return store.nbytes / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script out")
    parser.add_argument("--json", type=Path, help="file for times and bytes")
    args = parser.parse_args()
    torch.manual_seed(0)
    n, t = args.examples, args.tokens
    rng = np.random.default_rng(0)
    tokens = [Tokens(rng.integers(1000, 30_000, t), 3 * t // 4) for _ in range(n)]
    batch = pad(tokens, np.arange(n), 0).to(args.device)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(
        f"{n} examples of {t} tokens, {args.dtype}, {where}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, best of {args.rounds}"
    )

    dtype = getattr(torch, args.dtype)
    encoder = gte(args.device, 1 if args.tiny else 12).to(dtype)
    ids = batch.input_ids

    def embed() -> None:
        with torch.inference_mode():
            encoder(ids, None)

    rows = {"AirRep (GTE-small, 384)": (seconds(embed, args.device, 5 * args.rounds) / n, 384)}
    model = qwen(args.device, args.tiny).to(dtype)
    context = Context(target=Target("qwen2.5-0.5b", Path()), scratch=Path(), device=args.device)
    for rank in (16, 4):
        engine = GradientEngine(
            model, layers=MLP, rank=rank, random=context.torch_generator, bias=False
        )

        def gradients(engine: GradientEngine = engine) -> None:
            engine.gradients(batch)

        spent = seconds(gradients, args.device, args.rounds) / n
        rows[f"LoGra (MLP, rank {rank}, {engine.dim:,})"] = (spent, engine.dim)
        if rank == 16:

            def plain() -> None:
                example_losses(model, batch).sum().backward()
                model.zero_grad(set_to_none=True)

            model.requires_grad_(True)
            plain_pass = seconds(plain, args.device, args.rounds) / n
            model.requires_grad_(False)

    base_time, base_dim = rows["AirRep (GTE-small, 384)"]
    base_bytes = stored_bytes(base_dim, 64, "float32")
    print(f"{'':32}{'s/example':>11}{'slower':>9}{'bytes f32':>11}{'f16':>9}{'larger':>9}")
    for name, (spent, dim) in rows.items():
        wide, half = stored_bytes(dim, 64, "float32"), stored_bytes(dim, 64, "float16")
        print(
            f"{name:32}{spent:11.4f}{spent / base_time:9.1f}{wide:11,.0f}{half:9,.0f}"
            f"{wide / base_bytes:9.1f}"
        )
    print(f"{'a plain forward and backward':32}{plain_pass:11.4f}{plain_pass / base_time:9.1f}")
    print(f"published: {PUBLISHED}")
    if args.json:
        found = {
            name: {"seconds": spent, "bytes": stored_bytes(dim, 64, "float32")}
            for name, (spent, dim) in rows.items()
        }
        found["a plain forward and backward"] = {"seconds": plain_pass}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
