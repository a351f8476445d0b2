"""Speed of per-example gradients: the engine, plain training passes and other engines.

    OMP_NUM_THREADS=1 python benchmarks/gradient_speed.py [--examples 512] [--rank 16]
    python benchmarks/gradient_speed.py --shape qwen2-0.5b --dtype bfloat16 --tables gradients

Everything runs in one process on one model and one set of examples (the target `instruct` of the
suite `pocket`), in batches of the same length-sorted order. On a CPU, time is the process's own,
which other processes do not distort; on an accelerator it is wall time. Rounds cycle through all
contenders, and the best of each counts. Ratios are tdabench's throughput over the contender's.
Packages run their own passes; rows "with tdabench's loss", which takes logits of response tokens
only, compare the gradients alone.

`--shape qwen2-0.5b` uses a model with the shape of Qwen2.5-0.5B instead, with random weights, on
which time does not depend, and joins the corpus's examples into longer ones. Contenders that are
not installed (bergson, kronfluence) or run out of memory are left out and reported. `--json FILE`
writes the throughputs there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdabench.data.examples import Corpus, Example
from tdabench.method import Context
from tdabench.run.sources import load_suite
from tdabench.targets.batches import Batch, out_of_memory
from tdabench.targets.target import SCRATCH, Target, example_losses
from tdabench.toolkit.gradients import GradientEngine, select_layers

Run = Callable[[], Any]
TABLES = ("gradients", "trak", "ekfac")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="default: all"
    )
    parser.add_argument("--trak-dim", type=int, default=512)
    parser.add_argument("--shape", choices=["pocket", "qwen2-0.5b", "tiny"], default="pocket")
    parser.add_argument("--join", type=int, default=32, help="examples of pocket in one of qwen2's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens-a-batch", type=int, default=2048)
    parser.add_argument("--rows", default="", help="regular expression: only rows with it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the throughputs")
    args = parser.parse_args()

    suite = load_suite("pocket")
    target = suite.target("instruct").target
    train = suite.train[: args.examples]
    scratch = Path(tempfile.mkdtemp())
    args.checkpoint = "warm"
    if args.shape != "pocket":
        args.checkpoint = SCRATCH
        target = qwen(target, scratch / "target", args.shape, args.dtype)
        train = joined(suite.train, args.examples, args.join)
    elif args.dtype != "float32":
        parser.error("the models of pocket are taken in float32")
    context = Context(target=target, scratch=scratch, device=args.device)
    tokens = target.tokenize(train)
    batches = [b.to(args.device) for b in target.batches(tokens, args.tokens_a_batch)]
    lengths = [len(t) for t in tokens]
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(
        f"{args.shape}, {args.dtype}: {len(train)} examples of {np.mean(lengths):.0f} tokens, "
        f"{len(batches)} batches, {where}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}",
        flush=True,
    )

    found = {}
    if "gradients" in args.tables:
        runs = feature_runs(context, batches, args)
        found["gradients"] = table("per-example gradients", runs, len(train), args)
    if "trak" in args.tables:
        found["trak"] = table("TRAK features", trak_runs(context, train, args), len(train), args)
    if "ekfac" in args.tables:
        found["ekfac"] = table("EK-FAC factors", ekfac_runs(context, train, args), len(train), args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def qwen(pocket: Target, folder: Path, shape: str, dtype: str) -> Target:
    """Makes a target of Qwen2.5-0.5B's shape, or a tiny one, with the tokenizer of `pocket`."""
    from paper_cost import qwen_config, tiny_config

    config = tiny_config() if shape == "tiny" else qwen_config()
    shutil.copytree(pocket.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return Target(shape, folder, {}, template=pocket.template, max_length=512, dtype=dtype)


def joined(corpus: Corpus, n: int, k: int) -> list[Example]:
    """Joins `n` examples, each with one prompt from `corpus` and the responses of k examples."""
    picks = (np.arange(n)[:, None] + 311 * np.arange(k)) % len(corpus)
    return [
        Example(f"j{i}", corpus[p[0]].prompt, " ".join(corpus[j].response for j in p.tolist()))
        for i, p in enumerate(picks)
    ]


def model_of(context: Context, args: argparse.Namespace) -> Any:
    """Returns a new copy of the target's model."""
    model = context.target.fresh_model(args.checkpoint)
    return model.to(args.device, getattr(torch, args.dtype))


def table(
    title: str, runs: dict[str, Run], n: int, args: argparse.Namespace
) -> dict[str, float | None]:
    """Prints throughput of each run, and the first run's over it; on a GPU its memory, too.

    Returns examples per second of each run, None for one that ran out of memory.
    """
    runs = {name: run for name, run in runs.items() if re.search(args.rows, name)}
    best, peak = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, 0.0)
    on_gpu = args.device.startswith("cuda")
    for _ in range(args.rounds):
        for name, run in runs.items():
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                best[name] = min(best[name], seconds(run, args.device))
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
            if on_gpu:
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    ours = best[next(iter(runs))]
    print(f"\n{title:46} {'examples/s':>10} {'ratio':>7}" + "  GiB on top" * on_gpu)
    for name, took in best.items():
        figures = f"{n / took:10.1f} {took / ours:7.2f}" if took < np.inf else "    out of memory "
        print(f"{name:46} {figures}" + f"  {peak[name]:10.2f}" * on_gpu, flush=True)
    return {name: n / took if took < np.inf else None for name, took in best.items()}


def seconds(run: Run, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def feature_runs(
    context: Context, batches: list[Batch], args: argparse.Namespace
) -> dict[str, Run]:
    target, device = context.target, context.device
    model = target.model(args.checkpoint, device)
    projected = GradientEngine(model, rank=args.rank, random=context.torch_generator)
    whole = GradientEngine(model)
    trained = model_of(context, args).requires_grad_(True)
    frozen = model_of(context, args)

    def plain() -> None:
        for batch in batches:
            example_losses(trained, batch).sum().backward()
            trained.zero_grad(set_to_none=True)

    def usual() -> None:
        for batch in batches:
            mask = batch.attention_mask
            trained(
                input_ids=batch.input_ids, attention_mask=mask, labels=labels(batch)
            ).loss.backward()
            trained.zero_grad(set_to_none=True)

    def bare() -> None:
        """Times the passes that any engine with hooks needs, a lower bound on its time."""
        first = frozen.get_input_embeddings()
        hook = first.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())
        for batch in batches:
            example_losses(frozen, batch).sum().backward()
        hook.remove()

    def loop() -> None:
        names = [f"{n}.weight" for n, _ in select_layers(trained)]
        weights = [p for n, p in trained.named_parameters() if n in names]
        for batch in batches:
            for i in range(len(batch.input_ids)):
                t = int(batch.attention_mask[i].sum())
                one = Batch(
                    batch.index[i : i + 1],
                    batch.input_ids[i : i + 1, :t],
                    batch.attention_mask[i : i + 1, :t],
                    batch.loss_mask[i : i + 1, : t - 1],
                )
                grads = torch.autograd.grad(example_losses(trained, one).sum(), weights)
                torch.cat([g.flatten() for g in grads])

    runs: dict[str, Run] = {
        f"tdabench, projected to {args.rank} x {args.rank}": lambda: [
            projected.gradients(b) for b in batches
        ],
        "tdabench, whole gradients": lambda: [whole.gradients(b) for b in batches],
        "forward and backward, transformers' own loss": usual,
        "the same with tdabench's loss": plain,
        "the same to the inputs, without weight gradients": bare,
        "hooks on trainable weights, projecting after": hooks_after(trained, batches, projected),
        "batch-1 loop, whole gradients": loop,
    }
    # These make models of their own.
    if re.search(args.rows, name := "vmap(grad), whole gradients"):
        runs[name] = vmapped(context, batches, args)
    for name, own_loss in (("bergson", True), ("bergson with tdabench's loss", False)):
        if not re.search(args.rows, name):
            continue
        if importlib.util.find_spec("bergson"):
            runs[name] = bergson(context, batches, args, own_loss)
        else:
            print(f"bergson is not installed: {name} left out", file=sys.stderr)
    return runs


def labels(batch: Batch) -> torch.Tensor:
    """Returns token ids where the loss is taken, -100 elsewhere, for transformers and bergson."""
    out = torch.full_like(batch.input_ids, -100)
    out[:, 1:] = torch.where(batch.loss_mask, batch.input_ids[:, 1:], -100)
    return out


def hooks_after(model: Any, batches: list[Batch], engine: GradientEngine) -> Run:
    """Times common hooks: weights stay trainable; whole gradients are formed, then projected."""
    layers = {layer.name: layer for layer in engine.layers}

    def run() -> None:
        kept: dict[str, torch.Tensor] = {}
        inputs: dict[str, torch.Tensor] = {}
        handles = []
        for name, module in model.named_modules():
            if name not in layers:
                continue

            def forward(_m: Any, args: Any, _out: Any, name: str = name) -> None:
                inputs[name] = args[0].detach()

            def backward(_m: Any, _in: Any, out: Any, name: str = name) -> None:
                g = torch.einsum("bto,bti->boi", out[0], inputs[name]).float()
                layer = layers[name]
                g = g if layer.p_in is None else g @ layer.p_in
                g = g if layer.p_out is None else layer.p_out.T @ g
                kept[name] = g.flatten(1)

            handles.append(module.register_forward_hook(forward))
            handles.append(module.register_full_backward_hook(backward))
        for batch in batches:
            example_losses(model, batch).sum().backward()
            torch.cat([kept[name] for name in layers], dim=1)
            model.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()

    return run


def vmapped(context: Context, batches: list[Batch], args: argparse.Namespace) -> Run:
    from tdabench_gradients.traker import _attention

    model = model_of(context, args)
    model.set_attn_implementation("eager")
    names = {f"{n}.weight" for n, _ in select_layers(model)}
    weights = {n: p.detach() for n, p in model.named_parameters() if n in names}

    def loss(w: Any, ids: Any, attention: Any, mask: Any) -> torch.Tensor:
        kwargs = {"input_ids": ids[None], "attention_mask": attention[None]}
        logits = torch.func.functional_call(model, w, (), kwargs).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        return (losses * mask).sum() / mask.sum()

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))

    def run() -> None:
        for b in batches:
            found = gradient(weights, b.input_ids, _attention(b), b.loss_mask)
            torch.cat([g.flatten(1) for g in found.values()], dim=1)

    return run


def bergson(
    context: Context, batches: list[Batch], args: argparse.Namespace, own_loss: bool
) -> Run:
    """Times bergson's collector; `own_loss` uses its own passes, with logits at every token."""
    from bergson.collector.collector import fwd_bwd_factory
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor

    model = model_of(context, args)
    model.get_input_embeddings().requires_grad_(True)  # as in bergson, so that gradients flow
    n = sum(len(b.index) for b in batches)
    names = {name.removeprefix("model.") for name, _ in select_layers(model)}

    config = IndexConfig(run_path=str(context.scratch / "bergson"))
    passes = fwd_bwd_factory(config)

    def run() -> None:
        collector = GradientCollector(
            model=model.base_model,
            data=range(n),  # only its length is used
            cfg=config,
            processor=GradientProcessor(projection_dim=args.rank),
            target_modules=names,
            skip_index=True,
        )
        with collector:
            for batch in batches:
                if own_loss:
                    passes(model, batch.input_ids, labels(batch), {})
                else:
                    example_losses(model, batch).sum().backward()
                torch.cat([g.flatten(1) for g in collector.mod_grads.values()], dim=1)
                collector.mod_grads.clear()
                model.zero_grad(set_to_none=True)

    return run


def trak_runs(context: Context, train: Any, args: argparse.Namespace) -> dict[str, Run]:
    import tdabench_gradients.traker as adapter
    from tdabench_gradients.trak import TRAK

    def traker(most: int) -> None:
        """Times traker in batches of limited size, since it draws its projection for each batch."""
        kept, adapter._EXAMPLES_A_BATCH = adapter._EXAMPLES_A_BATCH, most
        try:
            adapter.Traker(proj_dim=args.trak_dim).build(context, train)
        finally:
            adapter._EXAMPLES_A_BATCH = kept

    sparse, dense = (TRAK(proj_dim=args.trak_dim, sketch=s) for s in ("sparse", "rademacher"))
    sides = TRAK(proj_dim=args.trak_dim, rank=args.rank)
    return {
        "tdabench trak, sparse sketch": lambda: sparse.features(context, train, "train", {}),
        f"tdabench trak, sides to {args.rank} first": lambda: sides.features(
            context, train, "train", {}
        ),
        "tdabench trak, dense sketch": lambda: dense.features(context, train, "train", {}),
        "traker, batches of 128": lambda: traker(128),
        "traker, batches of 32": lambda: traker(32),
    }


def ekfac_runs(context: Context, train: Any, args: argparse.Namespace) -> dict[str, Run]:
    from tdabench_influence.ekfac import EKFAC

    method = EKFAC(fisher="empirical", checkpoint=args.checkpoint)
    runs: dict[str, Run] = {"tdabench ekfac": lambda: method.build(context, train)}
    if importlib.util.find_spec("kronfluence") is None:
        print("kronfluence is not installed: left out", file=sys.stderr)
        return runs

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    from tdabench.targets.batches import pad

    target = context.target
    tokens = target.tokenize(train)
    # Sorted by length like ours, so that its batches have no more padding.
    order = np.argsort([-len(t) for t in tokens], kind="stable")
    names = [n for n, _ in select_layers(target.model(args.checkpoint, args.device))]

    class ResponseLoss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            return example_losses(model, Batch(order, *batch)).sum()

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            return batch[1]

    task = ResponseLoss()
    model = prepare_model(model_of(context, args), task)

    def collate(rows: list[int]) -> tuple[torch.Tensor, ...]:
        b = pad(tokens, order[np.asarray(rows)], target.pad_id)
        return b.input_ids, b.attention_mask, b.loss_mask

    def run() -> None:
        folder = tempfile.mkdtemp(dir=context.scratch)
        with contextlib.redirect_stderr(io.StringIO()):
            analyzer = Analyzer(
                "speed", model, task, cpu=args.device == "cpu", output_dir=folder,
                disable_tqdm=True, log_level=logging.ERROR,
            )  # fmt: skip
            analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0, collate_fn=collate))
            analyzer.fit_all_factors(
                "factors", Rows(len(tokens)), per_device_batch_size=32,
                factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
            )  # fmt: skip

    runs["kronfluence"] = run
    return runs


class Rows(torch.utils.data.Dataset):
    """Indices, since kronfluence needs a dataset; the collate function makes the batch."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if i >= self.n:
            raise IndexError(i)
        return i


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
    main()
