"""What a backend has: the contractions that passes are made of, as types: there is no code here."""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lora_kernels.activations import After, Before

__all__ = ["Contractions", "Kernels"]

_Source: TypeAlias = tuple[Tensor, Tensor]  # p `[M, K]` and q `[N, K]`, of which the product is p qᵀ
_Masked: TypeAlias = tuple[Tensor, Tensor, Tensor]  # p, q and the mask of their product
_Adapter: TypeAlias = tuple[Tensor, float, float]  # a `[R, K]`, alpha, dropout_p


class Contractions(Protocol):
    """The functions that each backend has, `lora_kernels.kernels` and `lora_kernels.torch_backend`.

    What each computes is said there. Both have more arguments of their own, which passes do not give.
    """

    def draw_noise(self, x: Tensor, count: int = 1) -> Tensor:
        """Draw what decides `count` masks of x."""

    def thin_pitch(self, rank: int, dtype: torch.dtype) -> int:
        """Elements from one row of an s to the next."""

    def outputs(self, x: Tensor, rank: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
        """Allocate what `shrink` returns, for shapes and strides alone."""

    def shrink(
        self, x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute s = alpha · (x · keep) aᵀ, and the mask."""

    def shrink_all(
        self, x: Tensor, rows: Sequence[_Adapter], *, noise: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Compute `shrink` for several adapters of one x."""

    def activate_shrink(
        self, gate: Tensor, up: Tensor | None, activation: str, rows: Sequence[_Adapter], *,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:  # fmt: skip
        """Compute h = a(gate) · up, and `shrink_all` of it."""

    def shrink_wgrad(
        self, dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute ds and dB from one read of dy."""

    def matmul_expand(
        self, sources: Sequence[_Source], bias: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Compute y = Σᵢ pᵢ qᵢᵀ + bias."""

    def matmul_expand_all(
        self, outputs: Sequence[tuple[Sequence[_Source], Tensor | None]], masked: Sequence[_Masked] = (), wide: int = 1
    ) -> list[Tensor]:
        """Compute a y for each."""

    def wgrad(
        self, left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None, *,
        into: Tensor | None = None, ready: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Compute g = leftᵀ (right · keep), or add it to `into`."""

    def wgrad_all(
        self, rows: Sequence[tuple[Tensor, torch.dtype, Tensor | None]], right: Tensor, ready: bool = False, *,
        into: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Compute `wgrad` for several left operands of one right one."""

    def activation_wgrad(
        self, gate: Tensor, up: Tensor | None, dh: Tensor, activation: str, after: After | None, *before: Before | None
    ) -> tuple[list[Tensor], Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
        """Compute the gradients of gate and up, and what the layers around them are asked for."""


class Kernels(Contractions, Protocol):
    """What "triton" has beside them: what its forms are made of, and what it is asked about a GPU."""

    def capability(self, device: torch.device) -> tuple[int, int] | None:
        """CUDA compute capability; None for AMD."""

    def describe_path(self, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        """How tiles are loaded, and why."""

    def uses_tf32(self, dtype: torch.dtype) -> bool:
        """Whether products in this dtype use TF32."""

    def library(self, sources: Sequence[_Source], bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Compute what `matmul_expand` does by the vendor's library."""

    def matmul_expand_all(
        self, outputs: Sequence[tuple[Sequence[_Source], Tensor | None]], masked: Sequence[_Masked] = (),
        wide: int = 1, config: int | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Compute a y for each, in a tile."""

    def beta1_all(
        self, outputs: Sequence[tuple[Sequence[_Source], Tensor | None]], masked: Sequence[_Masked] = (), wide: int = 1
    ) -> list[Tensor]:
        """Compute what `matmul_expand_all` does by the vendor's library."""

    def strategy(self, name: str, place: int | None = None) -> Callable[..., Any]:
        """What computes a large product in a form."""

    def stack(self, dy: Tensor, adapters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Allocate several ds side by side; copy their A so."""

    def repeat(self, pass_: Callable[..., Any], state: Hashable, *arguments: Any) -> Any:
        """Call a pass, or take its steps by notes."""

    def forget(self) -> None:
        """Forget all notes."""


if TYPE_CHECKING:  # held to it: kernels, whose types are not checked, are not
    from lora_kernels import torch_backend

    _torch: Contractions = torch_backend
