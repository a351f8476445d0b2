"""HiddenGrad against autograd through the whole model, and against its closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tdabench_gradients.hiddengrad import HiddenGrad

from tdabench.api import Context, Corpus, Target, UsageError

ARCHITECTURES = ("qwen2", "llama", "gpt2", "gpt_neox")


def raw(target: Target, folder: Path, examples: Corpus) -> np.ndarray:
    return np.asarray(HiddenGrad().encode(Context(target, folder), examples, "train"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_the_negative_gradient_at_the_last_states(
    make_target, tiny_corpus: Corpus, tmp_path: Path, architecture: str
) -> None:
    """Each example alone, unpadded: Hugging Face's own loss, differentiated by autograd."""
    target = make_target(architecture)
    some = tiny_corpus.subset(range(6))
    model = target.model("base")
    want = []
    for tokens in target.tokenize(some):
        ids = torch.from_numpy(tokens.ids)[None]
        states = model.base_model(input_ids=ids).last_hidden_state.detach().requires_grad_(True)
        logits = model.get_output_embeddings()(states)
        labels = ids.clone()
        labels[:, : tokens.start] = -100
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        (gradient,) = torch.autograd.grad(loss, states)
        want.append(-gradient[0].sum(0).numpy())
    np.testing.assert_allclose(raw(target, tmp_path, some), want, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_the_error_of_prediction_in_output_embeddings(
    tiny_target: Target, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    some = tiny_corpus.subset(range(5))
    model = tiny_target.model("base")
    w = model.get_output_embeddings().weight.double()
    want = []
    for tokens in tiny_target.tokenize(some):
        ids = torch.from_numpy(tokens.ids)
        with torch.no_grad():
            p = torch.softmax(model(input_ids=ids[None]).logits[0].double(), dim=1)
        places = range(max(tokens.start, 1), len(ids))
        errors = [w[ids[t]] - p[t - 1] @ w for t in places]
        want.append(torch.stack(errors).mean(0).numpy())
    np.testing.assert_allclose(raw(tiny_target, tmp_path, some), want, rtol=1e-4, atol=1e-6)


def test_a_capped_head_is_differentiated_too(
    tiny_target: Target, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """Gemma 2 caps its logits: cap * tanh(logits / cap) stands between head and loss."""
    from tdabench_gradients.hiddengrad import hidden_gradients
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from tdabench.api import pad

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=len(tiny_target.tokenizer), hidden_size=16, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
            final_logit_softcapping=0.5, max_position_embeddings=256,
        )  # fmt: skip
        model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    tokens = tiny_target.tokenize(tiny_corpus.subset(range(3)))
    found = hidden_gradients(model, pad(tokens, np.arange(3), tiny_target.pad_id))
    assert not model.get_output_embeddings()._forward_pre_hooks
    for row, t in zip(found, tokens):
        ids = torch.from_numpy(t.ids)
        states = model.model(input_ids=ids[None]).last_hidden_state[0].requires_grad_(True)
        logits = torch.tanh(model.lm_head(states) / 0.5) * 0.5
        start = max(t.start, 1)
        loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:])
        (gradient,) = torch.autograd.grad(loss, states)
        torch.testing.assert_close(row, -gradient.sum(0), rtol=1e-4, atol=1e-6)


def test_scores_are_cosines_of_whitened_gradients(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = HiddenGrad(damping=0.3)
    g = np.asarray(method.encode(tiny_context, tiny_corpus, "train"), dtype=np.float64)
    q = np.asarray(method.encode(tiny_context, tiny_queries, "query"), dtype=np.float64)
    c = np.cov(g.T, bias=True)
    inverse = np.linalg.inv(c + 0.3 * np.trace(c) / len(c) * np.eye(len(c)))
    a, b = q - g.mean(0), g - g.mean(0)
    norms = [np.sqrt(np.einsum("nd,de,ne->n", x, inverse, x)) for x in (a, b)]
    want = a @ inverse @ b.T / np.outer(*norms)
    found = method.build(tiny_context, tiny_corpus).score(tiny_queries)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    plain = replace(method, whiten=False, normalise=False)
    found = plain.build(tiny_context, tiny_corpus).score(tiny_queries)
    np.testing.assert_allclose(found, q @ g.T, rtol=1e-4, atol=1e-6)


def test_without_damping_directions_without_spread_are_left_out(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    few = tiny_corpus.subset(range(4))  # fewer examples than dimensions
    scores = HiddenGrad(damping=0.0).build(tiny_context, few).score(tiny_queries)
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() <= 1 + 1e-5


def test_parameters_are_checked() -> None:
    with pytest.raises(UsageError, match="damping must not be negative"):
        HiddenGrad(damping=-1)
    with pytest.raises(UsageError, match="unknown dtype 'half'"):
        HiddenGrad(dtype="half")
