"""The interface of a backend: types of the contractions that passes call, without code."""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lora_kernels.activations import After, Before
from lora_kernels.quantized import QuantizedWeight

__all__ = ["Contractions", "Kernels"]

# p `[M, K]` and q `[N, K]`; the product is p qᵀ.
_Source: TypeAlias = tuple[Tensor, Tensor]
# p, q and the mask of their product.
_Masked: TypeAlias = tuple[Tensor, Tensor, Tensor]
# a `[R, K]`, alpha and dropout_p.
_Adapter: TypeAlias = tuple[Tensor, float, float]


class Contractions(Protocol):
    """The functions of each backend, `lora_kernels.kernels` and `lora_kernels.torch_backend`.

    The backends document the functions in full. Both have further arguments, which passes do not use. `slot` is a place
    of a plan (`plan.Steps`), None for "torch".

    `segments` is a result of the function of that name: the rows are those of several groups, and each group has
    operands of its own. Then what is not of rows has one dim more, the groups: a `[G, R, K]`, q `[G, N, K]`, the bias
    `[G, N]`, B `[G, out, r]`, and so have the results of `wgrad`, with zeros for a group without rows. Rows of no group
    become zeros in the result of `matmul_expand_all`; other contractions do not read them, and what they write there is
    not specified. There are no masks, no `into`, and one output.
    """

    def segments(self, offsets: Tensor, rows: int, slot: Any = None) -> Any:
        """Return where the rows of each group lie: from `offsets[g]` to `offsets[g + 1]`, of `rows` rows."""

    def draw_noise(self, x: Tensor, count: int = 1) -> Tensor:
        """Draw the noise that decides `count` masks of x."""

    def dequantize(self, weight: QuantizedWeight, dtype: torch.dtype, slot: Any = None) -> Tensor:
        """Compute the values of a quantised W, `[out, in]`."""

    def thin_pitch(self, rank: int, dtype: torch.dtype) -> int:
        """Return the number of elements from one row of an s to the next."""

    def outputs(self, x: Tensor, rank: int, dropout_p: float) -> tuple[Tensor, Tensor | None]:
        """Allocate the results of `shrink`, for their shapes and strides."""

    def shrink(
        self, x: Tensor, a: Tensor, alpha: float, dropout_p: float = 0.0, *, noise: Tensor | None = None,
        slot: Any = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Compute s = alpha · (x · keep) aᵀ, and the mask."""

    def shrink_all(
        self, x: Tensor, rows: Sequence[_Adapter], *, noise: Tensor | None = None, slot: Any = None,
        segments: Any = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
        """Compute `shrink` for several adapters of one x."""

    def activate_shrink(
        self, gate: Tensor, up: Tensor | None, activation: str, rows: Sequence[_Adapter], *,
        noise: Tensor | None = None, slot: Any = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:  # fmt: skip
        """Compute h = a(gate) · up, and `shrink_all` of h."""

    def shrink_wgrad(
        self, dy: Tensor, s: Tensor, lora_B: Tensor, alpha: float, out_dtype: torch.dtype, into: Tensor | None = None,
        slot: Any = None, segments: Any = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Compute ds and dB from one read of dy."""

    def matmul_expand(
        self, sources: Sequence[_Source], bias: Tensor | None = None, keep: Tensor | None = None, slot: Any = None
    ) -> Tensor:
        """Compute y = Σᵢ pᵢ qᵢᵀ + bias."""

    def matmul_expand_all(
        self, outputs: Sequence[tuple[Sequence[_Source], Tensor | None]], masked: Sequence[_Masked] = (),
        wide: int = 1, slot: Any = None, segments: Any = None,
    ) -> list[Tensor]:  # fmt: skip
        """Compute a y for each output."""

    def wgrad(
        self, left: Tensor, right: Tensor, out_dtype: torch.dtype, keep: Tensor | None = None, *,
        into: Tensor | None = None, ready: bool = False, slot: Any = None, segments: Any = None,
    ) -> Tensor | None:  # fmt: skip
        """Compute g = leftᵀ (right · keep), or add it to `into`."""

    def wgrad_all(
        self, rows: Sequence[tuple[Tensor, torch.dtype, Tensor | None]], right: Tensor, ready: bool = False, *,
        into: Sequence[Tensor | None] | None = None, slot: Any = None, segments: Any = None,
    ) -> list[Tensor | None]:  # fmt: skip
        """Compute `wgrad` for several left operands of one right one."""

    def activation_wgrad(
        self, gate: Tensor, up: Tensor | None, dh: Tensor, activation: str, after: After | None,
        *before: Before | None, slot: Any = None,
    ) -> tuple[list[Tensor], Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
        """Compute the gradients of gate and up, and the requested results of the layers around them."""


class Kernels(Contractions, Protocol):
    """The further functions of "triton": parts of its forms, and queries about a GPU."""

    def capability(self, device: torch.device) -> tuple[int, int] | None:
        """Return the CUDA compute capability; None for AMD."""

    def describe_path(self, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        """Return how tiles are loaded, and the reason."""

    def uses_tf32(self, dtype: torch.dtype) -> bool:
        """Return whether products in this dtype use TF32."""

    def strategy(self, name: str, place: int | None = None) -> Callable[..., Any]:
        """Return the function that computes a large product in a form."""

    def stack(self, dy: Tensor, adapters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Allocate several ds side by side, and copy their A side by side."""

    def state(self, dtype: torch.dtype) -> Hashable:
        """Return the global settings that launches depend on."""

    def run_pass(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function whose launches follow one another on one stream."""

    def Slot(self) -> Any:
        """Return a new place for a settled launch."""


# mypy holds `torch_backend` to the protocol, but not `kernels`, because the types of `kernels` are not checked.
if TYPE_CHECKING:
    from lora_kernels import torch_backend

    _torch: Contractions = torch_backend
