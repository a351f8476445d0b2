"""Compares losses and gradients of every causal model type of transformers with its own forward.

    python benchmarks/model_sweep.py                 # all types, writes the table of docs/models.md
    python benchmarks/model_sweep.py --json FILE     # the same; a later call continues it
    python benchmarks/model_sweep.py llama mixtral   # prints the table of these types

Each type is built with two layers and random weights from a small configuration, with scalings and
caps of logits enabled. The reference is a loop over single examples: the model's own logits,
cross-entropy, and gradients of weights and biases by autograd. tdabench's losses and per-example
gradients are computed in one batch with padding on the right, as in all of tdabench. With padding
on the left and in bfloat16, losses are compared with the model's own forward of the same batch. The
comparison is repeated with the output matrix tied to the embedding, or untied if the default
configuration ties it. One process, one thread, about a minute of processor time.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from tdabench.errors import TdabenchError
from tdabench.io import fingerprint, read_json, sha256_file, write_json, write_text
from tdabench.targets.batches import Batch, Tokens, pad
from tdabench.targets.forward import plain_ids, way_of
from tdabench.targets.target import example_losses
from tdabench.toolkit.gradients import GradientEngine

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
MARK = "<!-- the rest of this page is written by benchmarks/model_sweep.py -->\n"
WITHIN = 1e-4  # the largest relative error of losses and gradients that counts as right
WITHIN_HALF = 1e-2  # the same in bfloat16, which rounds to 3 digits
MOST_WEIGHTS = 4_000_000

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd embedding_size dim n_embed lru_width attention_hidden_size "
        "rnn_hidden_size attn_hidden_size word_embed_proj_dim embedding_dim".split(), 32),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers".split(), 2),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads attention_heads linear_num_value_heads mamba_n_heads "
        "mamba_num_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads multi_query_group_num "
                    "linear_num_key_heads".split(), 2),
    **dict.fromkeys(
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_ff "
        "inner_dim shared_intermediate_size ffn_size intermediate_size_mlp "
        "dense_intermediate_size".split(), 48),
    **dict.fromkeys(
        "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size".split(), 24),
    **dict.fromkeys(
        "head_dim kv_channels attention_head_dim d_kv d_head rotary_dim qk_rope_head_dim "
        "qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim state_size "
        "mamba_d_state ssm_state_size hidden_size_per_layer_input".split(), 8),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token "
                    "expand mamba_expand global_attn_every_n_layers".split(), 2),
    **dict.fromkeys(
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
        "seq_length".split(), 128),
    **dict.fromkeys("n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups "
                    "n_groups".split(), 1),
    **dict.fromkeys("q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_head_dim".split(), 16),
    **dict.fromkeys("laurel_rank mamba_d_conv time_step_rank".split(), 4),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), 300),
    "num_kv_shared_layers": 0, "partial_rotary_factor": 1.0, "d_inner": 64, "sliding_window": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "is_decoder": True,
    # Scales and caps outside the layers, at values that change the logits:
    "logits_scaling": 8.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "lm_head_multiplier": 0.5, "logit_scale": 0.3, "final_logit_softcapping": 5.0,
}  # fmt: skip
LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
          "glm_moe_dsa", "minicpm3", "youtu", "bailing_hybrid", "dots3_note_text",
          "longcat_flash")  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {  # ... keeps the default
    **{kind: {"head_dim": ..., "num_key_value_heads": 4} for kind in LATENT},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False,
                 "attention_head_size": 8, "feed_forward_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30,
                 "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "xlm": {"emb_dim": 32, "causal": True, "n_langs": 1},
    "longcat_flash": {"head_dim": ..., "num_key_value_heads": 4, "zero_expert_num": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Result for one type: `outcome` is right, wrong, refused or not built."""

    kind: str
    outcome: str
    reason: str = ""
    name: str = ""
    way: str = ""
    losses: float = float("nan")
    gradients: float = float("nan")
    left: float = float("nan")
    left_alone: float = float("nan")  # the model's own left-padded losses against single examples
    share: float = float("nan")
    tied: bool = False  # whether the output matrix is the embedding
    other_head: float = float("nan")  # the larger of both errors with the output matrix (un)tied
    half: float = float("nan")  # error of the losses in bfloat16


def types() -> list[str]:
    """Returns every model type that transformers maps to a causal model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, tied: bool | None = None) -> Any:
    """Returns the configuration of a type with small values for all parameters of `SMALL`.

    `tied` ties the output matrix to the embedding or unties it; None keeps the default.
    """
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    small = SMALL if tied is None else SMALL | {"tie_word_embeddings": tied}
    values = _small(cls(), small) | CHANGES.get(kind, {})
    if tied is not None:
        values["tie_word_embeddings"] = tied
    return cls(**{k: v for k, v in values.items() if v is not ...})


def _small(config: Any, small: dict[str, Any]) -> dict[str, Any]:
    values = config.to_dict()
    changes = {}
    for key, value in small.items():
        if key in values and not isinstance(values[key], dict):
            optional = key in ("q_lora_rank", "sliding_window") and values[key] is None
            if not optional:
                changes[key] = value
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if inner is not None:
            changes[key] = {"model_type": inner.model_type, **_small(inner, small)}
    return changes


def tiny_model(kind: str, tied: bool | None = None) -> Any:
    """Builds a random model of a type, with weights large enough for a nonlinear function.

    Raises ValueError if the model is still large, and the error of the model's own forward if the
    small configuration is inconsistent.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(kind, tied), dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size / 1e6:,.0f}M weights with the small configuration")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            tiny_config(kind, tied), dtype=torch.float32
        ).eval()
        for p in model.parameters():
            if not bool(torch.isfinite(p).all()):
                torch.nn.init.normal_(p, std=0.02)
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding)
                  for p in m.parameters()}  # fmt: skip
    for p in model.parameters():
        if p.dim() >= 2 and id(p) not in embeddings:
            p.data.mul_(3.0)
    model.config.use_cache = False
    with torch.no_grad():
        ids = torch.tensor([plain_ids(model)[:9]])
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return model


def sequences(model: Any) -> list[Tokens]:
    """Returns five sequences of plain tokens of different lengths."""
    rng = np.random.default_rng(0)
    plain = plain_ids(model)
    return [
        Tokens(rng.choice(plain, size=length).astype(np.int64), start)
        for length, start in ((9, 4), (5, 2), (12, 7), (7, 1), (10, 9))
    ]


def own_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Computes the mean response loss of each example from the model's own logits: [b]."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    logits = getattr(out, "logits", None)
    logits = out[0] if logits is None else logits
    rows = logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        rows.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none"
    ).view(batch.loss_mask.shape)
    return losses.masked_fill(~batch.loss_mask, 0).sum(1) / batch.loss_mask.sum(1)


def left_padded(batch: Batch) -> Batch:
    """Returns the same examples with padding on the left."""

    def moved(v: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(int(n)) for row, n in zip(v, by)])

    by = batch.attention_mask.shape[1] - batch.attention_mask.sum(1)
    return Batch(
        batch.index, moved(batch.input_ids, by), moved(batch.attention_mask, by),
        moved(batch.loss_mask, by),
    )  # fmt: skip


def loop(model: Any, engine: GradientEngine, tokens: list[Tokens]) -> tuple[Any, Any]:
    """Computes losses [n] and gradients [n, dim] of single examples from the model's own logits."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.requires_grad_(True)
    losses, rows = [], []
    for i in range(len(tokens)):
        model.zero_grad(set_to_none=True)
        loss = own_losses(model, pad(tokens, np.array([i]), 1)).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        row = []
        for layer in engine.layers:
            if layer.weight:
                owner = layer.name.removesuffix(f".{layer.weight}.{layer.expert}")
                name, turned = f"{owner}.{layer.weight}", layer.module.is_transposed
                names = [name, f"{name}_bias"]
            else:
                names, turned = [f"{layer.name}.weight", f"{layer.name}.bias"], layer.conv1d
            columns = []
            for p in [parameters[n] for n in names[: 1 + layer.bias]]:
                g = torch.zeros_like(p) if p.grad is None else p.grad
                g = g[layer.expert] if layer.weight else g
                columns.append(g[:, None] if g.dim() == 1 else g.T if turned else g)
            row.append(torch.cat(columns, 1).reshape(-1))
        rows.append(torch.cat(row))
    model.requires_grad_(False)
    return np.array(losses), torch.stack(rows).numpy()


def compare(model: Any) -> tuple[float, float]:
    """Returns the largest relative errors of losses and of gradients with biases.

    Raises TdabenchError for a model that tdabench refuses.
    """
    engine = GradientEngine(model, bias=True)
    tokens = sequences(model)
    batch = pad(tokens, np.arange(len(tokens)), 1)
    with torch.no_grad():
        losses = example_losses(model, batch).numpy()
    gradients = engine.gradients(batch).numpy()
    want, grads = loop(model, engine, tokens)
    norms = np.linalg.norm(grads, axis=1)
    far = np.linalg.norm(gradients - grads, axis=1) / np.where(norms > 0, norms, 1)
    return float(np.abs(losses / want - 1).max()), float(far.max())


def batch_error(model: Any, batch: Batch) -> tuple[float, np.ndarray]:
    """Returns the largest relative error against the model's own losses of a batch, and those [b].

    The error is nan if the model's own forward does not accept the batch.
    """
    with torch.no_grad():
        try:
            theirs = own_losses(model, batch).float().numpy()
        except Exception:
            return float("nan"), np.full(len(batch.input_ids), np.nan)
        ours = example_losses(model, batch).float().numpy()
    return float(np.abs(ours / theirs - 1).max()), theirs


def is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = getattr(head, "weight", None), getattr(embedding, "weight", None)
    return weights[0] is not None and weights[0] is weights[1]


def other_head_error(kind: str, tied: bool) -> float:
    """Returns the larger error with the output matrix untied if `tied`, else tied.

    It is nan if the type has no such choice.
    """
    try:
        model = tiny_model(kind, not tied)
    except Exception:
        return float("nan")
    return max(compare(model)) if is_tied(model) is not tied else float("nan")


def measure(kind: str) -> Found:
    """Builds a type and compares it with its own forward."""
    try:
        model = tiny_model(kind)
    except Exception as e:
        return Found(kind, "not built", _line(e))
    name, tied = type(model).__name__, is_tied(model)
    try:
        way = way_of(model)
        off, far = compare(model)
        other = other_head_error(kind, tied)
    except TdabenchError as e:
        return Found(kind, "refused", str(e), name)
    except Exception as e:
        return Found(kind, "wrong", f"{type(e).__name__}: {_line(e)}", name)
    tokens = sequences(model)
    right = pad(tokens, np.arange(len(tokens)), 1)
    share = GradientEngine(model).coverage.share
    try:
        alone = np.concatenate(
            [batch_error(model, pad(tokens, np.array([i]), 1))[1] for i in range(len(tokens))]
        )
        on_left, theirs = batch_error(model, left_padded(right))
        left_alone = float(np.abs(theirs / alone - 1).max())
        half, _ = batch_error(model.bfloat16(), right)
    except Exception as e:
        return Found(kind, "wrong", f"{type(e).__name__}: {_line(e)}", name)
    good = max(off, far) <= WITHIN
    good = good and not (on_left > WITHIN or other > WITHIN or half > WITHIN_HALF)  # false for nan
    return Found(
        kind, "right" if good else "wrong", "", name, way, off, far, on_left, left_alone, share,
        tied, other, half,
    )  # fmt: skip


def _line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


def table(found: list[Found]) -> str:
    """Returns the generated part of docs/models.md."""
    import transformers

    counts = {o: sum(f.outcome == o for f in found) for o in
              ("right", "refused", "wrong", "not built")}  # fmt: skip
    built = len(found) - counts["not built"]
    lines = [
        f"transformers {transformers.__version__} has {len(found)} causal model types. {built} "
        f"could be built with a small configuration: {counts['right']} right, "
        f"{counts['refused']} refused with the reason, {counts['wrong']} wrong.",
        "",
        "| type | result | way | losses | gradients | padding left | other head | bfloat16 | "
        "covered |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for f in found:
        if f.outcome in ("right", "wrong") and f.way:
            left = "not accepted" if np.isnan(f.left) else f"{f.left:.0e}"
            if f.left_alone > WITHIN:
                left += " *"
            head = "" if np.isnan(f.other_head) else f"{f.other_head:.0e}"
            half = "not accepted" if np.isnan(f.half) else f"{f.half:.0e}"
            lines.append(
                f"| {f.kind} | {f.outcome} | {f.way} | {f.losses:.0e} | {f.gradients:.0e} | "
                f"{left} | {head} | {half} | {100 * f.share:.0f}% |"
            )
    lines += [
        "",
        "Columns: the largest relative errors of losses; of gradients, biases included; of losses "
        "with padding on the left; of losses and gradients with the output matrix tied to the "
        "embedding, or untied if it is tied by default (empty: the type has no choice); of losses "
        "in bfloat16; the share of the weights that gradients cover.",
        "",
        "\\* With padding on the left the model's own losses differ from the losses of single "
        "examples.",
        "",
    ]
    for outcome in ("refused", "wrong", "not built"):
        some = [f for f in found if f.outcome == outcome and not (outcome == "wrong" and f.way)]
        if some:
            lines += [f"## {outcome.capitalize()}", ""]
            lines += [f"- {f.kind}: {f.reason}" for f in some]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types (all of them, and the page, if none)")
    parser.add_argument("--json", type=Path, help="keep results there; a later call continues them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    of = fingerprint([transformers.__version__, sha256_file(Path(__file__))])
    kept: dict[str, Any] = {}
    if args.json and args.json.exists() and read_json(args.json)["of"] == of:
        kept = read_json(args.json)["types"]
    found = []
    for kind in args.types or types():
        f = Found(**kept[kind]) if kind in kept else measure(kind)
        found.append(f)
        kept[kind] = {k: v for k, v in asdict(f).items() if v == v}  # without nan
        if args.json:
            write_json(args.json, {"of": of, "types": kept})
        print(
            f"{f.kind:28} {f.outcome:9} {f.way:6} {f.losses:8.0e} {f.gradients:8.0e} {f.left:8.0e}"
            f" {f.other_head:8.0e} {f.half:8.0e} {f.share:6.2f}  {f.reason}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    if args.types:
        print(table(found))
    else:
        head = PAGE.read_text(encoding="utf-8").split(MARK)[0] if PAGE.exists() else ""
        write_text(PAGE, head + MARK + "\n" + table(found))


if __name__ == "__main__":
    main()
