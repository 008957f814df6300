"""Read quantised weights where others keep them, and say what is wrong with those that cannot be read.

Sources: bitsandbytes 0.50, `functional.py` (QuantState) and `nn/modules.py`; Dettmers et al. 2023, "QLoRA",
arXiv:2305.14314, appendix E (the 16 values of NF4); transformers 5.24, `integrations/finegrained_fp8.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["nested_of_bitsandbytes", "nf4_code", "of_bitsandbytes", "of_fp8", "of_int8"]

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP8_BLOCK = (128, 128)
_BITSANDBYTES = "QuantizedWeight.from_bitsandbytes"


def nf4_code(device: torch.device | None) -> Tensor:
    """Return the 16 values of NF4, fp32."""
    return torch.tensor(_NF4, dtype=torch.float32, device=device)


def of_bitsandbytes(layer: Any) -> dict[str, Any]:
    """Return the fields of a `Linear4bit` or its weight, but `nested`."""
    packed, state = _state(layer)
    out_in = (layer.out_features, layer.in_features) if hasattr(layer, "out_features") else tuple(state.shape)
    if tuple(state.shape) != out_in:
        raise ValueError(
            f"{_BITSANDBYTES}: quant_state.shape is {tuple(state.shape)} and the layer's (out_features, in_features) "
            f"are {out_in}; quantise the weight in the layout [out, in]."
        )
    return {
        "format": state.quant_type, "packed": packed, "shape": state.shape, "dtype": state.dtype,
        "scale": state.absmax, "block": state.blocksize, "code": state.code,
    }  # fmt: skip


def nested_of_bitsandbytes(layer: Any, kind: Any) -> Any:
    """Return the nested part of a `Linear4bit` or its weight as a `kind`, or None if its scales are not quantised."""
    _, state = _state(layer)
    if not state.nested:
        return None
    inner = state.state2
    if getattr(inner, "dtype", torch.float32) != torch.float32:
        raise ValueError(f"{_BITSANDBYTES}: quant_state.state2.dtype is {inner.dtype}; nested scales must be float32.")
    return kind(inner.code, inner.absmax, state.offset, inner.blocksize)


def _state(layer: Any) -> tuple[Tensor, Any]:
    """Return the packed tensor and the quant_state."""
    packed = layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)
    if not isinstance(packed, Tensor):
        raise TypeError(f"{_BITSANDBYTES}: expected a Linear4bit or its weight, got {type(layer).__name__}.")
    if packed.dtype == torch.int8 or hasattr(packed, "SCB"):
        raise TypeError(
            f"{_BITSANDBYTES}: the weight is an LLM.int8 weight, whose layer quantises its inputs as well; "
            "use QuantizedWeight.from_int8(CB, SCB) for CB · SCB / 127 alone."
        )
    # FSDP1 makes plain Parameters of weights, and bitsandbytes then reads the state of the layer.
    state = getattr(packed, "quant_state", None)
    state = getattr(layer, "quant_state", None) if state is None else state
    if state is None:
        raise ValueError(
            f"{_BITSANDBYTES}: quant_state is None: the weight is not quantised yet; bitsandbytes quantises a weight "
            "when its layer is moved, as by layer.to(device)."
        )
    if isinstance(state, (list, tuple)):
        raise ValueError(
            f"{_BITSANDBYTES}: quant_state is a {type(state).__name__}, as bitsandbytes before 0.43 wrote; "
            "quantise the weight again with a newer version."
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{_BITSANDBYTES}: the weight is packed for a CPU's AVX512 (quant_state.packing_format_for_cpu), which "
            "bitsandbytes does in a forward in eval mode; call layer.train() before the first forward."
        )
    if state.shape is None or len(state.shape) != 2:
        raise ValueError(
            f"{_BITSANDBYTES}: quant_state.shape is {state.shape}; it must be (out_features, in_features)."
        )
    return packed, state


def of_fp8(weight: Tensor, scale: Tensor, block: Sequence[int] | None) -> dict[str, Any]:
    """Return the fields of an FP8 weight, but `dtype`."""
    if not isinstance(weight, Tensor) or not isinstance(scale, Tensor):
        kinds = type(weight).__name__, type(scale).__name__
        raise TypeError(
            "QuantizedWeight.from_fp8: weight and weight_scale_inv must be tensors, got {} and {}.".format(*kinds)
        )
    if weight.dim() != 2:
        raise ValueError(f"QuantizedWeight.from_fp8: weight must be [out, in], got shape {tuple(weight.shape)}.")
    return {
        "format": "fp8",
        "packed": weight,
        "shape": weight.shape,
        "scale": scale,
        "block": _block(weight, scale, block),
    }


def _block(weight: Tensor, scale: Tensor, block: Sequence[int] | None) -> tuple[int, int]:
    """Return (rows, columns) of the weights that share a scale."""
    out_features, in_features = weight.shape
    if scale.numel() == 1 and (block is None or scale.dim() == 0):
        return max(1, out_features), max(1, in_features)
    if block is not None:
        # The check of the weight names what is no pair.
        return tuple(block) if isinstance(block, Sequence) else block  # type: ignore[return-value]
    if scale.shape in ((out_features,), (out_features, 1)):
        return 1, max(1, in_features)
    rows, columns = _FP8_BLOCK
    if scale.shape == (-(-out_features // rows), -(-in_features // columns)):
        return _FP8_BLOCK
    raise ValueError(
        f"QuantizedWeight.from_fp8: weight_scale_inv is {tuple(scale.shape)}, not a number for a tensor, a row or "
        f"a 128 x 128 block of a weight {tuple(weight.shape)}; name the blocks by block=(rows, columns)."
    )


def of_int8(CB: Tensor, SCB: Tensor) -> dict[str, Any]:
    """Return the fields of an int8 weight, but `dtype`."""
    if not isinstance(CB, Tensor) or not isinstance(SCB, Tensor):
        kinds = type(CB).__name__, type(SCB).__name__
        raise TypeError("QuantizedWeight.from_int8: CB and SCB must be tensors, got {} and {}.".format(*kinds))
    if CB.dim() != 2:
        raise ValueError(f"QuantizedWeight.from_int8: CB must be [out, in], got shape {tuple(CB.shape)}.")
    return {"format": "int8", "packed": CB, "shape": CB.shape, "scale": SCB, "block": (1, max(1, CB.shape[1]))}
