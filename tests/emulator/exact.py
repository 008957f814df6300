"""Cases of small integers, so that every sum is exact: results are the truth rounded once, bit for bit.

Inputs are -1, 0 and 1, few enough that what is rounded on its way (s, ds, h) has few bits. With p = 0.5, dropout's
factor is 2. For TF32, to whose error the rules of the project do not apply, these are the only cases.
"""

import torch
from torch import Tensor

from emulator.cases import CPU, Case, precision_of_products
from lora_kernels import dropout, plan, reference
from lora_kernels.constants import DTYPES
from lora_kernels.functional import lora_linear, lora_mlp, lora_projections
from lora_kernels.passes.layer import Projection
from lora_kernels.verify.problems import every_other

__all__ = ["mlp", "projections", "unequal"]

# the largest integer up to which all are numbers of the dtype; TF32 has as many bits as fp16
_WHOLE = {"bf16": 256, "fp16": 2048, "fp32": 1 << 24, "tf32": 2048}


class _Draw:
    """Draws operands: in float64, and as the kernels get them."""

    def __init__(self, dtype: torch.dtype, strided: bool = False) -> None:
        self.generator, self.dtype, self.strided = torch.Generator().manual_seed(3), dtype, strided

    def __call__(self, *shape: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
        values = torch.randint(-1, 2, shape, generator=self.generator).double()
        values *= torch.rand(shape, generator=self.generator) < share
        t = values.to(self.dtype)
        return values, every_other(t) if self.strided else t


def unequal(got: dict[str, Tensor], want: dict[str, Tensor]) -> str:
    """Return what is not the truth rounded once, or ""."""
    wrong = []
    for name, truth in want.items():
        bad = ~(got[name].double() == truth.to(got[name].dtype).double())
        if bad.any():
            at = tuple(int(i) for i in bad.nonzero()[0])
            values = f"{got[name][at].item():g}, exactly {truth[at].item():g}"
            wrong.append(f"{name}{list(at)} is {values}; {int(bad.sum())} of {bad.numel()}")
    return "; ".join(wrong)


def projections(
    dtype, m, k, widths, ranks, ps=(0.0,), precision="ieee", accumulate=False, place=None, strided=False
) -> Case:  # fmt: skip
    """A layer, or several of one x: y, dx, dA and dB; with `accumulate` a second step adds to the gradients.

    Args:
        dtype: "bf16", "fp16" or "fp32".
        m: Rows.
        k: in_features.
        widths: out_features of each.
        ranks: Of each.
        ps: Dropout of each, 0 or 0.5.
        precision: "ieee" or "tf32".
        accumulate: Whether gradients are added to those that are there.
        place: Of the large products' tile.
        strided: Whether no operand has an element next to another.
    """
    ps = ps * len(widths) if len(ps) == 1 else ps
    whole = _WHOLE["tf32" if precision == "tf32" else dtype]

    def step(leaves: list[Tensor], weights: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        adapters = list(zip(leaves[1::2], leaves[2::2], strict=True))
        more = dict(backend="triton", accumulate_grad=accumulate)
        if len(widths) == 1:
            ys = [lora_linear(leaves[0], weights[0], *adapters[0], dropout_p=ps[0], **more)]
        else:
            ys = list(lora_projections(leaves[0], weights, adapters, dropout_p=list(ps), **more))
        leaves[0].grad = None
        torch.autograd.backward(ys, dys)
        return ys

    def operands() -> tuple[list, list, list, list]:
        draw = _Draw(DTYPES[dtype], strided)
        x = draw(m, k)
        ws = [draw(n, k) for n in widths]
        dys = [draw(m, n) for n in widths]
        adapters = [(draw(r, k, share=min(1.0, 60 / k)), draw(n, r, share=min(1.0, 60 / n)))
                    for n, r in zip(widths, ranks, strict=True)]  # fmt: skip
        return x, ws, dys, adapters

    def launched(x, ws, dys, adapters) -> tuple[list[Tensor], list[Tensor]]:
        tensors = [x[1], *(t for a, b in adapters for t in (a[1], b[1]))]
        leaves = [t.detach().requires_grad_() for t in tensors]
        with plan.force_form("fused", place), precision_of_products(precision):
            for _ in range(2 if accumulate else 1):
                ys = step(leaves, [w for _, w in ws], [dy for _, dy in dys])
        return ys, leaves

    def judge() -> str:
        x, ws, dys, adapters = operands()
        want: dict[str, Tensor] = {"dx": torch.zeros(m, k, dtype=torch.float64)}
        for i, (keep, (w, _), (dy, _), ((a, _), (b, _)), p) in enumerate(
            zip(_masks(m, k, ps), ws, dys, adapters, ps, strict=True)
        ):
            factor = 2.0 if p else 1.0
            kept = x[0] * keep
            s, ds = factor * kept @ a.T, factor * dy @ b
            if max(s.abs().max(), ds.abs().max()) > whole:
                return "not exact: choose fewer"
            want |= {f"y{i}": x[0] @ w.T + s @ b.T, f"dA{i}": ds.T @ kept, f"dB{i}": dy.T @ s}
            want["dx"] += dy @ w + (ds @ a) * keep
        ys, leaves = launched(x, ws, dys, adapters)
        got = {"dx": leaves[0].grad}
        for i, y in enumerate(ys):
            got |= {f"y{i}": y.detach(), f"dA{i}": leaves[1 + 2 * i].grad, f"dB{i}": leaves[2 + 2 * i].grad}
        if accumulate:
            # the first sum is rounded before the second is added
            added = {name: 2 * t for name, t in want.items() if name[0] == "d" and name != "dx"}
            added = {name: t for name, t in added.items() if t.abs().max() <= _WHOLE[dtype]}
            want = {name: t for name, t in want.items() if name[0] == "y" or name == "dx"} | added
        return unequal(got, want)

    words = [precision] * (precision != "ieee") + ["accumulate"] * accumulate + ["strided"] * strided
    words += [] if place is None else [f"tile{place}"]
    masked = f" p={'/'.join(f'{p:g}' for p in ps)}" if any(ps) else ""
    name = f"exact {dtype} {m}x{k}x{'+'.join(map(str, widths))} r{'/'.join(map(str, dict.fromkeys(ranks)))}{masked}"
    return Case(" ".join([name, *words]), judge, lambda: launched(*operands()))


def _masks(m: int, k: int, ps: tuple[float, ...]) -> list[Tensor]:
    """The masks that a step draws: a seed for each projection that drops, in order."""
    torch.manual_seed(3)
    dropping = sum(p > 0 for p in ps)
    seeds = iter(dropout.draw_seed(CPU, dropping).reshape(-1) if dropping else ())
    return [reference.keep_mask(next(seeds), m, k, p) if p else torch.ones(m, k, dtype=torch.bool) for p in ps]


def mlp(dtype, m, k, hidden, r, precision="ieee", accumulate=False, gated=True) -> Case:
    """A gated MLP of squared ReLU, without dropout: y, dx, dA and dB of each layer."""
    whole = _WHOLE["tf32" if precision == "tf32" else dtype]
    count = 3 if gated else 2

    def operands() -> tuple:
        draw = _Draw(DTYPES[dtype])
        sides = [(k, hidden)] * (count - 1) + [(hidden, k)]
        # sums of two or three terms, so that their products stay small
        layers = [(draw(n, i, share=4 / i), draw(r, i, share=2 / i), draw(n, r, share=1 / r)) for i, n in sides]
        return draw(m, k), layers, draw(m, k, share=4 / k)

    def launched(x, layers, dy) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in (x[1], *(t[1] for q in layers for t in q[1:]))]
        entries = [Projection(w[1], leaves[1 + 2 * i], leaves[2 + 2 * i]) for i, (w, _, _) in enumerate(layers)]
        gate = entries[0] if gated else None
        with precision_of_products(precision):
            for _ in range(2 if accumulate else 1):
                leaves[0].grad = None
                more = dict(activation="relu2", backend="triton", accumulate_grad=accumulate)
                y = lora_mlp(leaves[0], gate, *entries[-2:], **more)
                y.backward(dy[1])
        return y.detach(), leaves

    def judge() -> str:
        x, layers, dy = operands()
        (wd, ad, bd), *before = [tuple(t[0] for t in q) for q in reversed(layers)]
        before.reverse()
        pre = [x[0] @ w.T + x[0] @ a.T @ b.T for w, a, b in before]
        g, u = pre[0], pre[1] if gated else torch.ones_like(pre[0])
        h = g.clamp(min=0) ** 2 * u
        s, ds = h @ ad.T, dy[0] @ bd
        dh = dy[0] @ wd + ds @ ad
        dpre = [dh * u * 2 * g.clamp(min=0), dh * g.clamp(min=0) ** 2][: count - 1]
        want = {"y": h @ wd.T + s @ bd.T, f"dA{count - 1}": ds.T @ h, f"dB{count - 1}": dy[0].T @ s}
        dx, rounded = torch.zeros_like(x[0]), [*pre, h, s, ds, dh, *dpre]
        for i, (d, (w, a, b)) in enumerate(zip(dpre, before, strict=True)):
            s, ds = x[0] @ a.T, d @ b
            rounded += [s, ds]
            want |= {f"dA{i}": ds.T @ x[0], f"dB{i}": d.T @ s}
            dx += d @ w + ds @ a
        want["dx"] = dx
        if (most := max(t.abs().max().item() for t in rounded)) > whole:
            return f"not exact: {most:g} is above {whole}"
        y, leaves = launched(x, layers, dy)
        got = {"y": y, "dx": leaves[0].grad}
        for i in range(count):
            got |= {f"dA{i}": leaves[1 + 2 * i].grad, f"dB{i}": leaves[2 + 2 * i].grad}
        if accumulate:
            want = {name: t if name in ("y", "dx") else 2 * t for name, t in want.items()}
            want = {name: t for name, t in want.items() if name in ("y", "dx") or t.abs().max() <= _WHOLE[dtype]}
        return unequal(got, want)

    words = [precision] * (precision != "ieee") + ["accumulate"] * accumulate + ["ungated"] * (not gated)
    name = f"exact mlp relu2 {dtype} {m}x{k}x{hidden} r{r}"
    return Case(" ".join([name, *words]), judge, lambda: launched(*operands()))
