r"""Several projections of one x, for example Q, K and V: the products of `linear`, a launch with a row per projection.

    forward    sᵢ  = scalingᵢ · Dᵢ(x) Aᵢᵀ                shrink           one read of x, a mask and a product for each
               yᵢ  = x Wᵢᵀ + sᵢ Bᵢᵀ + biasᵢ              matmul_expand    one launch for all outputs
    backward   dsᵢ = scalingᵢ · keep_scaleᵢ · dyᵢ Bᵢ     shrink   \ shrink_wgrad: both from one read of dyᵢ, a launch
               dBᵢ = dyᵢᵀ sᵢ                             wgrad    / for each
               dx  = Σᵢ dyᵢ Wᵢ + keepᵢ · (dsᵢ Aᵢ)        matmul_expand    one accumulator, one store
               dAᵢ = dsᵢᵀ (keepᵢ · x)                    wgrad            one read of x

Two launches forward and n + 2 backward, at ranks up to 32. A projection without an adapter has no row in the thin
products. Weights are not copied. Only the sᵢ are side by side and, for large M without dropout, the dsᵢ and, by one
more launch, a copy of the Aᵢ. Then one thin product replaces several that are mostly padding.

Saved for backward: x, the parameters, the sᵢ (M·Σrᵢ elements) and the masks, of these only the tensors that the needed
gradients take. An output without a gradient costs nothing in backward.

Source: Hu et al. 2021, arXiv:2106.09685; one LoRA product of x for Q, K and V: Unsloth's `LoRA_QKV` (idea). No code
was taken.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lora_kernels import plan
from lora_kernels.passes.layer import Adapted, Kept, Part, Projection, as_dtype, dense, readable, rows

__all__ = ["backward", "backward_pass", "expand", "forward", "forward_pass", "with_dense"]


def forward(
    x: Tensor, projections: Sequence[Projection], backend: str, noise: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Compute each y `[M, outᵢ]`, and for backward each s `[M, rᵢ]` and the backend's mask.

    s and mask are None for a projection without an adapter, and the mask is None without dropout. `noise` decides the
    masks; with None, this function draws the noise.
    """
    return plan.run(backend, forward_pass, (), rows(x), projections, noise)


def forward_pass(
    steps: plan.Steps, x: Tensor, projections: Sequence[Projection], noise: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Compute `forward` with the steps of a plan."""
    # Copies come before the launches, because the launches overlap.
    projections = [
        q if q.lora_B is None or q.lora_B.dtype == x.dtype else q._replace(lora_B=q.lora_B.to(x.dtype))
        for q in with_dense(steps, projections, x)
    ]
    shrunk, keeps = _shrink(steps, x, projections, noise)
    return expand(steps, x, projections, shrunk), shrunk, keeps


def with_dense(steps: plan.Steps, projections: Sequence[Projection], x: Tensor) -> Sequence[Projection]:
    """Return the projections with weights that are tensors in x's dtype."""
    if all(isinstance(q.weight, Tensor) for q in projections):
        return projections
    return [q._replace(weight=dense(steps, q.weight, x.dtype, i)) for i, q in enumerate(projections)]


def expand(
    steps: plan.Steps, x: Tensor, projections: Sequence[Projection], shrunk: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute each y of `forward` from x `[M, in]` and each s; the weights are tensors."""
    form = steps.once("y", _form_of_y, steps, x, projections, shrunk)
    outputs = [
        # A projection with an s has a B.
        ([(x, q.weight)] if s is None else [(x, q.weight), (s, as_dtype(q.lora_B, x.dtype))], q.bias)  # type: ignore[arg-type]
        for q, s in zip(projections, shrunk, strict=True)
    ]
    return form.compute(outputs)


def _form_of_y(
    steps: plan.Steps, x: Tensor, projections: Sequence[Projection], shrunk: Sequence[Tensor | None]
) -> plan.Expander:
    """Choose how to compute each y."""
    cols = sum(q.weight.shape[0] for q in projections)
    rank = max((s.shape[1] for s in shrunk if s is not None), default=0)
    return plan.expander(steps.backend, steps["y"], x, x.shape[1], cols, rank, alone=False)


def _shrink(
    steps: plan.Steps, x: Tensor, projections: Sequence[Projection], noise: Tensor | None = None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Compute each s and mask of `forward` from x `[M, in]`."""
    adapted: list[Adapted] = [q for q in projections if q.lora_A is not None]
    if not adapted:
        return [None] * len(projections), [None] * len(projections)
    operands = [(readable(q.lora_A, x.dtype), q.alpha, q.dropout_p) for q in adapted]
    of_adapted = zip(*steps.ops.shrink_all(x, operands, noise=noise, slot=steps["s"]), strict=True)
    low_rank = [(None, None) if q.lora_A is None else next(of_adapted) for q in projections]
    return [s for s, _ in low_rank], [keep for _, keep in low_rank]


def backward(
    x: Kept, parts: Sequence[Part], need_x: bool, backend: str
) -> tuple[Kept, list[list[Tensor | None]]]:  # fmt: skip
    """Compute dx `[M, in]` if needed, and the needed dA and dB of each part. x is `[M, in]`."""
    return plan.run(backend, backward_pass, (need_x,), parts, x)


def backward_pass(
    steps: plan.Steps, need_x: bool, parts: Sequence[Part], x: Kept,
    made: Sequence[tuple[Kept, Tensor | None]] | None = None,
) -> tuple[Kept, list[list[Tensor | None]]]:  # fmt: skip
    """Compute `backward` with the steps of a plan.

    `made` has ds and dB of each part if they were computed together with its dy.
    """
    dx = stack = None
    form: Any = None
    rights: Sequence[Tensor | None] = ()
    weights: list[Tensor] = []
    if need_x:
        form = steps.once("dx", _form_of_dx, steps, parts)
        # Copies of any A and W come before the launches, because the launches overlap.
        weights = [dense(steps, part.weight, part.dy.dtype, i) for i, part in enumerate(parts)]
        if made is None and steps.once("stacks", _stacks, form, steps.backend, parts):
            stack = _stack(parts)
        else:
            rights = list(map(_right, parts))
    if made is None:
        columns = stack.columns if stack else (None,) * len(parts)
        made = list(map(_ds_and_dB, range(len(parts)), parts, columns, (steps,) * len(parts)))
    if need_x:
        summed = [(part.dy, weight.t()) for part, weight in zip(parts, weights, strict=True)]
        wide, masked = len(summed), []
        if stack:
            summed.append(stack.source)
        for i, right in enumerate(rights):
            if right is not None and parts[i].keep is None:
                summed.append((made[i][0], right))
            elif right is not None:
                masked.append((made[i][0], right, parts[i].keep))
        (dx,) = form.compute([(summed, None)], masked, wide=wide)
    gradients: list[list[Tensor | None]] = [[None, d_lora_B] for _, d_lora_B in made]
    which = [i for i, part in enumerate(parts) if part.need_A]
    if which:
        operands = [(made[i][0], parts[i].dtypes[0], parts[i].keep) for i in which]
        into, ready = [parts[i].into_A for i in which], form is not None and form.overlaps
        d_lora_As = steps.ops.wgrad_all(operands, x, ready=ready, into=into, slot=steps["dA"])
        for i, d_lora_A in zip(which, d_lora_As, strict=True):
            gradients[i][0] = d_lora_A
    return dx, gradients


def _form_of_dx(steps: plan.Steps, parts: Sequence[Part]) -> plan.Expander:
    """Choose how to compute dx."""
    adapted = [part for part in parts if part.lora_A is not None]
    rank = max((part.lora_A.shape[0] for part in adapted), default=0)
    inner, cols = sum(part.dy.shape[1] for part in parts), parts[0].weight.shape[1]
    masked = any(part.keep is not None for part in adapted)
    return plan.expander(steps.backend, steps["dx"], parts[0].dy, inner, cols, rank, masked, True, len(parts), False)


def _right(part: Part) -> Tensor | None:
    """Return the right side of a part's thin product in dx, or None without an adapter."""
    if part.lora_A is None:
        return None
    as_ = as_dtype if part.keep is None else readable
    return as_(part.lora_A, part.dy.dtype).t()


class _Stack(NamedTuple):
    """All thin products of dx as one product: its source, and the columns for the ds of each part."""

    source: tuple[Tensor, Tensor]
    columns: list[Tensor | None]


def _stacks(form: plan.Expander, backend: str, parts: Sequence[Part]) -> bool:
    """Return whether to lay the thin products of dx side by side, because one product takes fewer K steps."""
    adapted = [part for part in parts if part.lora_A is not None]
    if not form.overlaps or any(part.keep is not None or part.s is None for part in adapted):
        return False
    return plan.stacks(backend, parts[0].dy, [part.lora_A for part in adapted])


def _stack(parts: Sequence[Part]) -> _Stack:
    """Lay the thin products of dx side by side."""
    adapters = [part.lora_A for part in parts if part.lora_A is not None]
    ds, columns, lora_A = plan.contractions("triton").stack(parts[0].dy, adapters)
    free = iter(columns)
    return _Stack((ds, lora_A.t()), [None if part.lora_A is None else next(free) for part in parts])


def _ds_and_dB(i: int, part: Part, ds: Tensor | None, steps: plan.Steps) -> tuple[Kept, Tensor | None]:
    """Compute the needed ones of ds, written to `ds` if given, and dB of part i."""
    dy, _, _, lora_B, s, _, _, into, alpha, dtypes, _ = part
    ops, slot = steps.ops, steps[i]
    if lora_B is None:
        return None, None if s is None else ops.wgrad(dy, s, dtypes[1], into=into, slot=slot)
    lora_B = readable(lora_B, dy.dtype)
    if s is None:
        return ops.shrink(dy, lora_B.t(), alpha, slot=slot)[0], None
    there: dict[str, Any] = {} if ds is None else {"ds": ds}
    return ops.shrink_wgrad(dy, s, lora_B, alpha, dtypes[1], into, slot=slot, **there)
