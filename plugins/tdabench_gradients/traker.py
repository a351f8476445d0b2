"""TRAK as computed by its authors' package (PyPI name `traker`, import name `trak`)."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Index,
    MethodError,
    MissingExtra,
    TDAMethod,
    UsageError,
    check_pooling,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch

# traker holds whole gradients of a batch, and on a CPU draws its projection anew for each batch.
# Batches are therefore large, and a projection that fits in this many bytes is kept.
_EXAMPLES_A_BATCH, _TOKENS_A_BATCH, _FLOATS_A_BATCH = 128, 8192, 1 << 27
_FLOATS_OF_PROJECTION = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Traker(TDAMethod):
    """The `traker` package on the target: vmap(grad), its own projector and scores.

    The same quantity as `trak` with a dense Gaussian sketch, up to the package's rescaling of the
    inverse. On a CPU its projector draws the whole projection anew for every batch; here it is
    kept if it takes at most 2 GiB, so use a small `proj_dim` there. The package has no groups:
    example scores are pooled as for other methods.

    checkpoint   checkpoint of the target at which gradients are computed
    layers       regular expression searched in layer names; None is all but the output head
    proj_dim     dimension of the projection
    damping      lambda as a multiple of the mean eigenvalue of the projected gradients' covariance
    reduction    "sum" or "mean" of the loss over the tokens of a response
    pooling      how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature  of softmax pooling; unused by sum and mean
    """

    name = "traker"
    family = "gradient"
    source = "Park et al. 2023, arXiv 2303.14186; package traker 0.3"
    summary = "TRAK by its authors' package"
    grid = {"damping": (0.1, 1.0)}  # each needs its own index, which takes minutes

    pooling: str = "sum"
    temperature: float = 1.0
    checkpoint: str = "base"
    layers: str | None = None
    proj_dim: int = 512
    damping: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)
        if self.damping < 0 or self.proj_dim < 1:
            raise UsageError(f"{self.name}: damping must be >= 0 and proj_dim >= 1")

    def build(self, context: Context, train: Sequence[Example]) -> TrakerIndex:
        package = trak_package()
        if self.damping == 0 and len(train) <= self.proj_dim:
            raise MethodError(
                f"{self.name}: {len(train)} examples in {self.proj_dim} dimensions need a ridge",
                "Set damping above 0, or lower proj_dim",
            )
        folder = context.scratch / "traker"
        shutil.rmtree(folder, ignore_errors=True)
        runner = _Runner(self, context, package, folder, len(train))
        with _quiet():
            runner.traker.load_checkpoint(runner.model.state_dict(), model_id=0)
            for index, batch in runner.batches(train):
                runner.traker.featurize(batch, inds=index)
                context.progress("traker features", int(index[-1]) + 1, len(train))
            grads = np.asarray(runner.traker.saver.current_store["grads"])
            # lambda is added to the sum of outer products, so it is a multiple of tr(X^T X) / dim.
            ridge = self.damping * float(np.square(grads, dtype=np.float64).sum()) / self.proj_dim
            runner.traker.score_computer.lambda_reg = ridge
            runner.traker.finalize_features()
        return TrakerIndex(self, context, folder, len(train))

    def load(self, context: Context, path: Path) -> TrakerIndex:
        meta = read_json(path / "index.json")
        self.check_saved(path, meta)
        trak_package()
        folder = context.scratch / "traker-loaded"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(path / "traker", folder)
        return TrakerIndex(self, context, folder, int(meta["n_train"]))


class TrakerIndex(Index):
    """traker's save folder, and scoring against it."""

    def __init__(self, method: Traker, context: Context, folder: Path, n_train: int) -> None:
        self.method, self.context, self.folder, self.n_train = method, context, folder, n_train
        self.pooling, self.temperature = method.pooling, method.temperature
        self._calls = 0

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        if not len(queries):
            return np.empty((0, self.n_train), dtype=np.float32)
        name, self._calls = f"queries-{self._calls}", self._calls + 1
        runner = _Runner(self.method, self.context, trak_package(), self.folder, self.n_train, True)
        with _quiet():
            runner.traker.start_scoring_checkpoint(
                exp_name=name,
                checkpoint=runner.model.state_dict(),
                model_id=0,
                num_targets=len(queries),
            )
            for index, batch in runner.batches(queries):
                runner.traker.score(batch, inds=index)
            scores = np.array(runner.traker.finalize_scores(exp_name=name), dtype=np.float32)
        for file in self.folder.rglob(f"{name}*"):  # the scores of this call are no longer needed
            file.unlink()
        return np.ascontiguousarray(scores.T)

    def save(self, path: Path) -> None:
        shutil.copytree(self.folder, path / "traker", ignore=shutil.ignore_patterns("queries-*"))
        meta = {"method": self.method.name, "version": self.method.version, "n_train": self.n_train}
        write_json(path / "index.json", meta)


def trak_package() -> Any:
    """Imports the module `trak` of the package traker; raises if it is PyPI's other `trak`."""
    try:
        import trak
    except ImportError as e:
        raise MissingExtra(
            "the package traker", remedy="Install it with: pip install traker"
        ) from e
    if not hasattr(trak, "TRAKer"):
        raise MethodError(
            "the installed module `trak` is not TRAK but an unrelated program of that name",
            "Run: pip uninstall trak && pip install traker",
        )
    return trak


class _Runner:
    """A TRAKer on its own model, into which traker loads state."""

    def __init__(
        self,
        method: Traker,
        context: Context,
        package: Any,
        folder: Path,
        n_train: int,
        resume: bool = False,
    ) -> None:
        from tdabench.api import select_layers

        self.method, self.context = method, context
        self.model = context.target.fresh_model(method.checkpoint).to(context.device)  # type: ignore[arg-type]
        # Fused attention has no batching rule under vmap.
        self.model.set_attn_implementation("eager")
        chosen = [f"{name}.weight" for name, _ in select_layers(self.model, method.layers)]
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        self.size = sum(sizes[name] for name in chosen)  # floats per gradient
        with _quiet():
            self.traker = package.TRAKer(
                model=self.model,
                task=_task(method.reduction),
                train_set_size=n_train,
                save_dir=str(folder),
                load_from_save_dir=resume,
                device=str(context.device),  # traker mistakes torch.device("cpu") for CUDA
                proj_dim=method.proj_dim,
                projector_seed=context.seed,
                grad_wrt=chosen,
                use_half_precision=False,
                logging_level=100,
            )

        if self.size * method.proj_dim <= _FLOATS_OF_PROJECTION:
            _keep_projection(self.traker.projector)

    def batches(
        self, examples: Sequence[Example]
    ) -> Iterator[tuple[np.ndarray, tuple[torch.Tensor, ...]]]:
        """Yields (index, (token ids, additive attention mask, loss mask)), longest first."""
        target = self.context.target
        most = max(1, min(_EXAMPLES_A_BATCH, _FLOATS_A_BATCH // self.size))
        for batch in target.batches(target.tokenize(examples), _TOKENS_A_BATCH, most):
            b = batch.to(self.context.device)
            yield b.index, (b.input_ids, _attention(b), b.loss_mask)


def _keep_projection(projector: Any) -> None:
    """Makes a projector draw each block of its matrix once, with the same numbers."""
    import torch

    if not hasattr(projector, "generate_sketch_matrix"):
        return  # the GPU projector generates its numbers on the fly

    class Kept(type(projector)):  # type: ignore[misc]  # a closure over the matrix would leak
        def generate_sketch_matrix(self, generator_state: torch.Tensor) -> None:
            key = generator_state.cpu().numpy().tobytes()
            if key not in self.drawn:
                self.proj_matrix: Any = torch.empty_like(self.proj_matrix)
                super().generate_sketch_matrix(generator_state)
                self.drawn[key] = self.proj_matrix
            self.proj_matrix = self.drawn[key]

    projector.drawn = {}
    projector.__class__ = Kept


def _attention(batch: Batch) -> torch.Tensor:
    """Builds an additive causal mask [b, 1, t, t]: deriving it from padding fails under vmap."""
    import torch

    t = batch.input_ids.shape[1]
    causal = torch.ones(t, t, device=batch.input_ids.device).tril().bool()
    seen = causal & batch.attention_mask.bool()[:, None, None, :]
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, math.log(1e-30))


def _task(reduction: str) -> Any:
    import torch
    from trak.modelout_functions import AbstractModelOutput

    class ResponseMargin(AbstractModelOutput):
        """The log-odds of the response tokens, as `trak` defines it."""

        def __init__(self) -> None:
            pass

        @staticmethod
        def _losses(model, weights, buffers, ids, attention, mask):
            kwargs = {"input_ids": ids[None], "attention_mask": attention[None]}
            out = torch.func.functional_call(model, (weights, buffers), (), kwargs)
            logits = out.logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            rest = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
            return losses, rest, mask.float()

        @staticmethod
        def get_output(model, weights, buffers, ids, attention, mask):
            losses, rest, m = ResponseMargin._losses(model, weights, buffers, ids, attention, mask)
            # Outside the response the odds may be infinite: mask them before multiplying.
            total = torch.where(mask, -losses - rest.log(), 0.0).sum()
            return total / m.sum() if reduction == "mean" else total

        @staticmethod
        def get_out_to_loss_grad(model, weights, buffers, batch):
            def one(ids, attention, mask):
                _, rest, m = ResponseMargin._losses(model, weights, buffers, ids, attention, mask)
                return (rest * m).sum() / m.sum()

            with torch.no_grad():
                return torch.func.vmap(one)(*batch)[:, None]

    return ResponseMargin()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses traker's progress bars on stderr, which belongs to the harness."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
