"""Make and run one problem of the layer, for `verify` and `bench`."""

import torch
from torch import Tensor

from lora_kernels import dropout, reference, torch_backend
from lora_kernels.functional import lora_linear
from lora_kernels.verify.numerics import Problem

__all__ = ["every_other", "make_problem", "run_problem", "same_bits", "storages", "with_mask"]


def make_problem(
    batch: tuple[int, ...], in_features: int, out_features: int, r: int, dtype: torch.dtype, device: str, *,
    adapter_dtype: torch.dtype | None = None, bias: bool = False, scaling: float = 2.0, dropout_p: float = 0.0,
    seed: int = 0,
) -> Problem:  # fmt: skip
    """Draw a problem in which every term matters: unit-variance activations, weights of 1/√fan_in, a nonzero B.

    Args:
        batch: Leading dims of x.
        in_features: K.
        out_features: N.
        r: Rank.
        dtype: Dtype of x, weight, bias and dy.
        device: Device of all tensors; the numbers are the same on every device.
        adapter_dtype: Dtype of lora_A and lora_B; `dtype` if None.
        bias: Whether the layer has a bias.
        scaling: Multiplies the low-rank term.
        dropout_p: Drop probability; `with_mask` fills in the mask.
        seed: Seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    adapters = adapter_dtype or dtype
    return Problem(
        x=draw(*batch, in_features),
        weight=draw(out_features, in_features, scale=in_features**-0.5),
        lora_A=draw(r, in_features, scale=in_features**-0.5, dtype=adapters),
        lora_B=draw(out_features, r, scale=max(r, 1) ** -0.5, dtype=adapters),
        dy=draw(*batch, out_features),
        bias=draw(out_features) if bias else None,
        scaling=scaling,
        dropout_p=dropout_p,
    )


def with_mask(problem: Problem, backend: str, seed: int) -> Problem:
    """Fill in the dropout mask that `backend` ("triton" or "torch") draws after `torch.manual_seed(seed)`."""
    if not problem.dropout_p:
        return problem
    x, p = problem.x, problem.dropout_p
    rows = x.reshape(-1, x.shape[-1])
    torch.manual_seed(seed)
    if backend == "triton":
        keep = reference.keep_mask(dropout.draw_seed(x.device), *rows.shape, p)
    else:
        keep = torch_backend.draw_mask(rows.shape, p, x.device).bool()
    return Problem(**{**vars(problem), "keep": keep.view(x.shape)})


def run_problem(problem: Problem, backend: str, seed: int) -> dict[str, Tensor]:
    """Run the layer forward and backward after `torch.manual_seed(seed)`; return outputs by `numerics`' names."""
    leaves = {
        name: getattr(problem, name).detach().requires_grad_()
        for name in ("x", "lora_A", "lora_B", "bias")
        if getattr(problem, name) is not None
    }
    torch.manual_seed(seed)
    y = lora_linear(
        leaves["x"], problem.kept_weight, leaves["lora_A"], leaves["lora_B"], scaling=problem.scaling,
        bias=leaves.get("bias"), dropout_p=problem.dropout_p, backend=backend,
    )  # fmt: skip
    y.backward(problem.dy)
    names = {"x": "dx", "lora_A": "d_lora_A", "lora_B": "d_lora_B", "bias": "dbias"}
    return {"y": y.detach()} | {names[name]: leaf.grad for name, leaf in leaves.items()}


def every_other(t: Tensor) -> Tensor:
    """Copy a matrix so that its elements lie two apart, between NaNs, the first of them off a 16-byte boundary."""
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"))
    return buffer[..., 1:-2:2].copy_(t)


def storages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the whole storage of each tensor, including bytes outside the tensor."""
    return {
        name: torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()
        for name, t in tensors.items()
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Check that two tensors agree bit for bit, NaN and signed zeros included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
