"""`LoRALinear`: a frozen linear layer with a trainable low-rank adapter, in PEFT's words."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.functional import lora_linear
from lora_kernels.functional.base import base
from lora_kernels.functional.checks import check_number
from lora_kernels.modules import quantized
from lora_kernels.quantized import layers

__all__ = ["LoRALinear", "check_base", "check_numbers", "listened_to"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LoRALinear(nn.Module):
    """A drop-in for `nn.Linear` whose weight is frozen and whose update has rank r.

    y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ,    scaling = lora_alpha / r, or lora_alpha / √r with rsLoRA

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        r: Rank of the update, >= 1.
        lora_alpha: Numerator of `scaling`.
        lora_dropout: Probability of dropping an element of the adapter's input, in training mode only.
        bias: Whether the base layer has a bias (frozen, too).
        use_rslora: Scale by 1/√r instead of 1/r (Kalajdzievski 2023, arXiv:2312.03732).
        device: Device of the parameters.
        dtype: Dtype of the parameters; adapters of an existing layer may differ, see `from_linear`.

    Attributes:
        weight: Frozen, `[out_features, in_features]`.
        bias: Frozen, `[out_features]`, or None.
        lora_A: Trainable, `[r, in_features]`, initialised as in PEFT (Kaiming uniform, a = √5).
        lora_B: Trainable, `[out_features, r]`, initially zero, so that the layer starts as its base.
        scaling: A plain number, read at each call; may be set at any time.
        merged: Whether `weight` includes the update at the moment.
        accumulate_grad: Whether backward itself adds to the `.grad` of lora_A and lora_B, see `lora_linear`; initially
            False, may be set at any time.
        shared_with: Names of other parameters that share memory with `weight`, as `swap_linear` found them; initially
            empty. With names, `merge` gives the layer a weight of its own.
        backend: As in `lora_linear`, initially "auto"; may be set at any time. With "reference", gradients of the layer
            can be differentiated again, any number of times.

    The state dict of a merged layer is that of a plain linear layer (`weight`, `bias`).

    Raises:
        TypeError: r is not an int; `lora_alpha` or `lora_dropout` is not a number.
        ValueError: r < 1, `lora_alpha` is not finite, or `lora_dropout` outside [0, 1].
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    merged: bool
    accumulate_grad: bool
    shared_with: tuple[str, ...] = ()
    # A class attribute, so that layers pickled before there was one have it as well.
    backend: str = "auto"
    # For a quantised weight, the rest of the layer that had it, see `modules.quantized`.
    _shell: Any = None
    # While merged: A, B and the scaling at the time of `merge`, and the weight if `merge` made a copy of it.
    _added: Any

    def __init__(
        self, in_features: int, out_features: int, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
        bias: bool = True, use_rslora: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._configure(in_features, out_features, r, lora_alpha, lora_dropout, use_rslora)
        self._adopt(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
        use_rslora: bool = False, dtype: torch.dtype | None = None,
    ) -> "LoRALinear":  # fmt: skip
        """Wrap an existing layer: share its weight and bias, copy nothing, freeze both.

        A bitsandbytes `Linear4bit` or transformers' `FP8Linear` keeps its weight quantised: each pass dequantises it
        into the dtype of x, whatever the layer's `compute_dtype` is.

        Args:
            linear: The layer to adapt. The new layer takes over its parameters, which stop requiring grad.
            r: Rank of the update.
            lora_alpha: Numerator of `scaling`.
            lora_dropout: Drop probability of the adapter's input in training.
            use_rslora: Scale by 1/√r.
            dtype: Dtype of the adapters; the base's if None, for a quantised base the dtype that it was quantised from.
                float32 over a 16-bit base is PEFT's default.

        Raises:
            TypeError: `linear` is neither one of these nor exactly an `nn.Linear` (a subclass may compute something
                else); for a number, as `LoRALinear`.
            ValueError: `linear` has hooks, or a forward of its own, which would no longer run; for a number, as
                `LoRALinear`.
        """
        check_base(linear, "LoRALinear.from_linear: linear")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._configure(linear.in_features, linear.out_features, r, lora_alpha, lora_dropout, use_rslora)
        self._adopt(linear, dtype)
        self.train(linear.training)
        return self

    def reset_lora_parameters(self) -> None:
        """Initialise A again and zero B, so that the layer computes the same as its base."""
        if self.merged:
            raise RuntimeError("LoRALinear is merged; call unmerge() before resetting its adapter.")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y, `[*, out_features]`, from x, `[*, in_features]`."""
        own = self._parameters
        try:
            # `nn.Module.__getattr__` takes longer than all checks of the call.
            tensors: Any = own["weight"], own["lora_A"], own["lora_B"], own["bias"]
        except KeyError:
            # A parametrization, for example, keeps its tensor elsewhere.
            tensors = self.weight, self.lora_A, self.lora_B, self.bias
        return self._compute(x, *tensors)

    def _compute(
        self, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **more: Any
    ) -> Tensor:
        """Compute the layer's output from the given tensors, which may be shards of the layer's own."""
        whole = weight if self._shell is None else self.whole_weight()
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("LoRALinear is merged; call unmerge() before training.")
            return base("LoRALinear", x, whole, bias, self.backend)
        return lora_linear(
            x, whole, lora_A, lora_B, scaling=self.scaling, bias=bias,
            dropout_p=self.lora_dropout if self.training else 0.0, backend=self.backend,
            accumulate_grad=self.accumulate_grad, **more,
        )  # fmt: skip

    def whole_weight(self) -> Any:
        """Return W as `lora_linear` takes it: `weight`, or for a quantised base a `QuantizedWeight` of it."""
        return self.weight if self._shell is None else layers.read(self)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, in place: W += scaling · B A, computed in fp32 and rounded once.

        A weight that is shared, as a tied output head shares the embedding's, must not change for others. With names in
        `shared_with`, which `swap_linear` sets, the layer gets a copy of the weight, with a `UserWarning`. A layer that
        you made yourself does not know of others: set `shared_with`, or others change as well. Does nothing when
        merged.
        """
        if self.shared_with and not self.merged:
            warnings.warn(
                f"LoRALinear.merge: the weight is shared with {', '.join(self.shared_with)}, so this layer now has a "
                "merged copy of its own; unmerge() ties it again.",
                stacklevel=3,
            )
        self._merge()

    @torch.no_grad()
    def _merge(self) -> None:
        if not self.merged:
            tied = None
            if self._shell is not None:
                tied = self.weight
                merged = quantized.merged_weight(self, self._update(self.lora_A, self.lora_B, self.scaling))
                quantized.put(self, merged)
            elif self.shared_with:
                tied = self.weight
                self.weight = nn.Parameter(tied.clone(), requires_grad=tied.requires_grad)
            self._added = self.lora_A.detach().clone(), self.lora_B.detach().clone(), self.scaling, tied
            if self._shell is None:
                self._add_update(*self._added[:3])
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the update that `merge` added from the weight, exact up to the rounding of the two sums.

        The layer keeps copies of the adapters from the time of `merge`, because they may have changed since. If `merge`
        made a copy of a shared weight, the layer gets the shared weight back, exactly.
        """
        if self.merged:
            lora_A, lora_B, scaling, tied = self._added
            if tied is None:
                self._add_update(lora_A, lora_B, -scaling)
            elif self._shell is None:
                self.weight = tied
            else:
                quantized.put(self, tied)
            self.merged, self._added = False, None

    def extra_repr(self) -> str:
        """Describe the arguments that made the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, bias={self.bias is not None}"
            + (", use_rslora=True" if self.use_rslora else "")
            + (", merged=True" if self.merged else "")
        )

    def _configure(
        self, in_features: int, out_features: int, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool
    ) -> None:
        check_numbers("LoRALinear", r, lora_alpha, lora_dropout)
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.lora_alpha, self.lora_dropout, self.use_rslora = lora_alpha, lora_dropout, use_rslora
        self.scaling = float(lora_alpha) / (math.sqrt(r) if use_rslora else r)
        self.merged = self.accumulate_grad = False

    def _adopt(self, linear: nn.Linear, dtype: torch.dtype | None) -> None:
        if type(linear) is nn.Linear:
            self.weight = linear.weight.requires_grad_(False)
            self.register_parameter("bias", linear.bias)
            if linear.bias is not None:
                linear.bias.requires_grad_(False)
        else:
            quantized.adopt(self, linear)
        like: dict[str, Any] = dict(device=self.weight.device, dtype=dtype or self.whole_weight().dtype)
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, **like))
        self.reset_lora_parameters()

    def _update(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Compute scaling · B A, at least in fp32."""
        like: dict[str, Any] = dict(
            device=self.weight.device, dtype=torch.promote_types(self.whole_weight().dtype, torch.float32)
        )
        return (lora_B.to(**like) @ lora_A.to(**like)).mul_(scaling)

    def _add_update(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        self.weight.copy_(self._update(lora_A, lora_B, scaling).add_(self.weight))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise RuntimeError(f"LoRALinear {prefix.rstrip('.') or '(root)'} is merged; call unmerge() before loading.")
        if self._shell is not None:
            quantized.take_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shell is not None:
            quantized.save_state(self, destination, prefix, keep_vars)
        if self.merged:
            del destination[prefix + "lora_A"], destination[prefix + "lora_B"]


def check_numbers(name: str, r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Refuse numbers that define no adapter; `name` is the class in error messages.

    Raises:
        TypeError: r is not an int, or another argument is not a number.
        ValueError: r < 1, `lora_alpha` is not finite, or `lora_dropout` outside [0, 1].
    """
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"{name}: r must be an int, got {type(r).__name__} {r!r}.")
    if r < 1:
        raise ValueError(f"{name}: r must be at least 1, got {r}.")
    check_number(name, "lora_alpha", lora_alpha)
    check_number(name, "lora_dropout", lora_dropout)
    if not math.isfinite(lora_alpha):
        raise ValueError(f"{name}: lora_alpha must be finite, got {lora_alpha}.")
    if not 0.0 <= lora_dropout <= 1.0:
        raise ValueError(f"{name}: lora_dropout must be in [0, 1], got {lora_dropout}.")


def check_base(linear: nn.Module, what: str, way_out: str = "") -> None:
    """Refuse a layer that a `LoRALinear` cannot replace; `what` and `way_out` are words for the message.

    Raises:
        TypeError: `linear` is neither exactly an `nn.Linear` (a subclass may compute something else) nor quantised as
            `quantized.layers` knows.
        ValueError: `linear` has hooks, or a forward of its own, which would no longer run.
    """
    if type(linear) is not nn.Linear and layers.kind_of(linear) is None:
        way_out = way_out or (
            "; give its weight and bias to a plain nn.Linear if that computes the same, or leave it and add the "
            "low-rank term to its result with lora_kernels.functional.lora_add"
        )
        raise TypeError(f"{what} is a {type(linear).__name__}, not exactly an nn.Linear{way_out}.")
    kind = layers.kind_of(linear)
    if kind is not None and type(linear).forward is not kind.forward:
        raise TypeError(
            f"{what} is a {type(linear).__name__} with a forward of its own, and may compute something else than "
            f"{kind.__name__}{way_out}."
        )
    lost = listened_to(linear)
    if lost:
        raise ValueError(
            f"{what} has {', '.join(lost)} set on it, which would no longer run. Remove that first, and put it on the "
            f"new layer if it is to see the adapter's part as well{way_out}."
        )


def listened_to(module: nn.Module) -> list[str]:
    """List the hooks of a module, and a forward set on the instance: all of them need the module to be called."""
    return [name for name in _HOOKS if getattr(module, name)] + ["forward"] * ("forward" in vars(module))
