"""`LoRAQKV` and `LoRAMLP`: layers that belong together, computed if possible in the launches of one layer.

Both hold ordinary layers under transformers' names: a `LoRALinear` or, for a projection without an adapter, a frozen
`nn.Linear`. So code that searches a model for `LoRALinear` finds these layers: state dicts, adapter files,
`merge_and_unload`, `swap_linear`, the styles of `lora_kernels.parallel`. At each call the block reads the layers'
parameters and computes all layers at once. The forward of each child works, too.

Some children must be called themselves: a child with hooks or a replaced forward, which would not run otherwise, a
child of another class, for example a sharded, quantised or parametrised layer, and one with a `backend` of its own. If
there is one, or a global module hook, the block calls its children one by one, and computes the same in more launches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.activations import activated
from lora_kernels.functional import lora_mlp
from lora_kernels.functional.checks import check_activation
from lora_kernels.functional.projections import project
from lora_kernels.modules.linear import LoRALinear, check_base, check_numbers, listened_to
from lora_kernels.passes.layer import Projection

__all__ = ["LoRAMLP", "LoRAQKV"]


class _Block(nn.Module):
    """The common part of both blocks: create the children, and read their parameters."""

    names: tuple[str, ...]

    def _make(self, shapes: Sequence[tuple[int, int]], targets: Sequence[str], bias: bool, **how: Any) -> None:
        """Create a child for each (in_features, out_features), a `LoRALinear` if the child is among the targets."""
        self._check_targets(targets)
        check_numbers(type(self).__name__, how["r"], how["lora_alpha"], how["lora_dropout"])
        like = {name: how[name] for name in ("device", "dtype")}
        for name, shape in zip(self.names, shapes, strict=True):
            plain = name not in targets
            child = nn.Linear(*shape, bias, **like) if plain else LoRALinear(*shape, bias=bias, **how)
            setattr(self, name, child.requires_grad_(False) if plain else child)

    @classmethod
    def _check_layers(cls, linears: Sequence[nn.Module], targets: Sequence[str], *numbers: Any) -> list[str]:
        """Refuse layers that the block cannot replace; return the names of the targets without an adapter."""
        cls._check_targets(targets)
        check_numbers(cls.__name__, *numbers)
        new = [name for name, linear in zip(cls.names, linears, strict=True) if type(linear) is not LoRALinear]
        for name, linear in zip(cls.names, linears, strict=True):
            if name in new:
                check_base(linear, f"{cls.__name__}.from_linears: {name}")
        # Several dtypes are allowed, because autocast casts them to one.
        devices = [linear.weight.device for linear in linears]
        if len(set(devices)) > 1:
            each = ", ".join(f"{name} {device}" for name, device in zip(cls.names, devices, strict=True))
            raise ValueError(f"{cls.__name__}.from_linears: the layers must have one device, got {each}.")
        return [name for name in new if name in targets]

    def _take(self, linears: Sequence[Any], adapt: Sequence[str], **how: Any) -> None:
        """Take existing layers as children: with new adapters for those in `adapt`, the others as they are."""
        for name, linear in zip(self.names, linears, strict=True):
            setattr(self, name, LoRALinear.from_linear(linear, **how) if name in adapt else linear)
        for child in self._children():
            if type(child) is nn.Linear:
                child.requires_grad_(False)
        self.train(linears[0].training)

    @classmethod
    def _check_targets(cls, targets: Sequence[str]) -> None:
        known = ", ".join(cls.names)
        if isinstance(targets, str) or not targets:
            raise ValueError(f"{cls.__name__}: targets must be a list of at least one of {known}, got {targets!r}.")
        if wrong := [name for name in targets if name not in cls.names]:
            bad = ", ".join(map(repr, wrong))
            raise ValueError(f"{cls.__name__}: targets has {bad}, which is none of its layers: {known}.")

    def _children(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.names]

    def _together(self) -> tuple[list[Projection], list[bool]] | None:
        """Return each child as a projection and its `accumulate_grad`, or None if a child has to be called itself."""
        children = self._children()
        entries: list[Any] = list(map(_projection, children))
        if None in entries or _has_any_global_hook():
            return None
        return entries, [getattr(child, "accumulate_grad", False) for child in children]

    def reset_lora_parameters(self) -> None:
        """Initialise each A again and zero each B: see `LoRALinear`."""
        for child in self._children():
            if isinstance(child, LoRALinear):
                child.reset_lora_parameters()

    def merge(self) -> None:
        """Add each update to its weight, in place: see `LoRALinear`."""
        for child in self._children():
            if isinstance(child, LoRALinear):
                child.merge()

    def unmerge(self) -> None:
        """Subtract from the weights the updates that `merge` added: see `LoRALinear`."""
        for child in self._children():
            if isinstance(child, LoRALinear):
                child.unmerge()


class LoRAQKV(_Block):
    """Queries, keys and values of one x, in the launches of one layer.

    q, k, v = x Wᵢᵀ + biasᵢ + scalingᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ for i = q, k, v, each as in a `LoRALinear` and with a dropout
    mask of its own, in one call of `lora_qkv`.

    Args:
        hidden_size: Size of each input.
        q_features: Size of each query: num_heads · head_dim.
        kv_features: Size of each key and each value: num_key_value_heads · head_dim; `q_features` if None.
        r: Rank of the updates, >= 1.
        lora_alpha: Numerator of `scaling`.
        lora_dropout: Probability of dropping an element of an adapter's input, in training mode only.
        bias: Whether the base layers have biases (frozen, too).
        use_rslora: Scale by 1/√r instead of 1/r.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        targets: Which of "q_proj", "k_proj" and "v_proj" have an adapter; the others are frozen `nn.Linear`.

    Attributes:
        q_proj: The child of that name; the others are k_proj and v_proj. The block reads their parameters, `scaling`
            and `accumulate_grad` at each call. A child may be replaced by any module that maps x; the block then
            calls that module.

    Shapes: x `[*, hidden_size]`; q `[*, q_features]`, k and v `[*, kv_features]`.

    Raises:
        TypeError: As `LoRALinear`.
        ValueError: As `LoRALinear`; `targets` is empty or has a name that is not a child's.
    """

    names = ("q_proj", "k_proj", "v_proj")
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(
        self, hidden_size: int, q_features: int, kv_features: int | None = None, r: int = 8, lora_alpha: float = 8,
        lora_dropout: float = 0.0, bias: bool = True, use_rslora: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, targets: Sequence[str] = names,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = q_features, *[q_features if kv_features is None else kv_features] * 2
        self._make(
            [(hidden_size, width) for width in widths], targets, bias, r=r, lora_alpha=lora_alpha,
            lora_dropout=lora_dropout, use_rslora=use_rslora, device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_linears(
        cls, q: nn.Module, k: nn.Module, v: nn.Module, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
        use_rslora: bool = False, dtype: torch.dtype | None = None, targets: Sequence[str] = names,
    ) -> "LoRAQKV":  # fmt: skip
        """Wrap existing layers: share their weights and biases, copy nothing, freeze all.

        Layers of several dtypes can be called under `torch.autocast` only.

        Args:
            q: The layer of the queries: an `nn.Linear`, or a `LoRALinear`, which is kept as it is.
            k: The layer of the keys.
            v: The layer of the values.
            r: Rank of the updates.
            lora_alpha: Numerator of `scaling`.
            lora_dropout: Drop probability of the adapters' input in training.
            use_rslora: Scale by 1/√r.
            dtype: Dtype of the adapters; each base's if None.
            targets: Which of "q_proj", "k_proj" and "v_proj" get an adapter; the others are kept and frozen.

        Raises:
            TypeError: A layer is neither exactly an `nn.Linear` nor a `LoRALinear`; for a number, as `LoRALinear`.
            ValueError: A layer has hooks; the layers differ in in_features or device; `targets` is empty or has another
                name; for a number, as `LoRALinear`.
        """
        adapt = cls._check_layers((q, k, v), targets, r, lora_alpha, lora_dropout)
        if not q.in_features == k.in_features == v.in_features:
            raise ValueError(
                f"LoRAQKV.from_linears: q, k and v must take the same number of features, got {q.in_features}, "
                f"{k.in_features} and {v.in_features}."
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        how = dict(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora, dtype=dtype)
        self._take((q, k, v), adapt, **how)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q, k and v from x."""
        together = self._together()
        if together is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        entries, added = together
        q, k, v = project("lora_qkv", x, entries, "auto", added)
        return q, k, v


class LoRAMLP(_Block):
    """A gated MLP, y = down(act(gate(x)) · up(x)), each layer as in a `LoRALinear`, in one call of `lora_mlp`.

    Args:
        hidden_size: Size of each input and of each output.
        intermediate_size: Size of the activation's input.
        r: Rank of the updates, >= 1.
        lora_alpha: Numerator of `scaling`.
        lora_dropout: Probability of dropping an element of an adapter's input, in training mode only.
        bias: Whether the base layers have biases (frozen, too).
        use_rslora: Scale by 1/√r instead of 1/r.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        targets: Which of "gate_proj", "up_proj" and "down_proj" have an adapter; the others are frozen `nn.Linear`.
        activation: "silu", "gelu", "gelu_tanh" or "relu2", see `lora_mlp`.
        recompute: Compute gate(x) and up(x) again in backward instead of saving them. No effect while the block calls
            its children one by one.

    Attributes:
        gate_proj: The child of that name; the others are up_proj and down_proj. As in `LoRAQKV`.
        activation: May be set at any time.
        recompute: May be set at any time.

    Shapes: x and y `[*, hidden_size]`.

    Raises:
        TypeError: As `LoRALinear`; `activation` is not a string.
        ValueError: As `LoRALinear`; `activation` is not a known name; `targets` is empty or has a name that is not a
            child's.
    """

    names = ("gate_proj", "up_proj", "down_proj")
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(
        self, hidden_size: int, intermediate_size: int, r: int = 8, lora_alpha: float = 8, lora_dropout: float = 0.0,
        bias: bool = True, use_rslora: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, targets: Sequence[str] = names, activation: str = "silu",
        recompute: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._configure(activation, recompute)
        inward = hidden_size, intermediate_size
        self._make(
            [inward, inward, inward[::-1]], targets, bias, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            use_rslora=use_rslora, device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_linears(
        cls, gate: nn.Module, up: nn.Module, down: nn.Module, r: int = 8, lora_alpha: float = 8,
        lora_dropout: float = 0.0, use_rslora: bool = False, dtype: torch.dtype | None = None,
        targets: Sequence[str] = names, activation: str = "silu", recompute: bool = False,
    ) -> "LoRAMLP":  # fmt: skip
        """Wrap existing layers: share their weights and biases, copy nothing, freeze all.

        Layers of several dtypes can be called under `torch.autocast` only.

        Args:
            gate: The layer before the activation: an `nn.Linear`, or a `LoRALinear`, which is kept as it is.
            up: The layer whose output multiplies the activation; of a class and shape as gate.
            down: The layer after both.
            r: Rank of the updates.
            lora_alpha: Numerator of `scaling`.
            lora_dropout: Drop probability of the adapters' input in training.
            use_rslora: Scale by 1/√r.
            dtype: Dtype of the adapters; each base's if None.
            targets: Which of "gate_proj", "up_proj" and "down_proj" get an adapter; the others are kept and frozen.
            activation: "silu", "gelu", "gelu_tanh" or "relu2".
            recompute: Compute gate(x) and up(x) again in backward instead of saving them.

        Raises:
            TypeError: A layer is neither exactly an `nn.Linear` nor a `LoRALinear`; `activation` is not a string; for a
                number, as `LoRALinear`.
            ValueError: A layer has hooks; the shapes do not fit together, or the devices differ; `activation` is not a
                known name; `targets` is empty or has another name; for a number, as `LoRALinear`.
        """
        adapt = cls._check_layers((gate, up, down), targets, r, lora_alpha, lora_dropout)
        if gate.in_features != up.in_features or not gate.out_features == up.out_features == down.in_features:
            shapes = ", ".join(f"{q.in_features} to {q.out_features}" for q in (gate, up, down))
            raise ValueError(
                "LoRAMLP.from_linears: gate and up must have one shape, and down take what they give; got layers of "
                f"{shapes} features."
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._configure(activation, recompute)
        how = dict(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora, dtype=dtype)
        self._take((gate, up, down), adapt, **how)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Compute y from x."""
        together = self._together()
        if together is None:
            check_activation("LoRAMLP", self.activation)
            return self.down_proj(activated(self.gate_proj(x), self.up_proj(x), self.activation))
        entries, added = together
        return lora_mlp(x, *entries, activation=self.activation, recompute=self.recompute, accumulate_grad=added)

    def extra_repr(self) -> str:
        """Describe the block's own settings."""
        return f"activation={self.activation!r}" + (", recompute=True" if self.recompute else "")

    def _configure(self, activation: str, recompute: bool) -> None:
        check_activation("LoRAMLP", activation)
        self.activation, self.recompute = activation, recompute


def _projection(layer: Any) -> Projection | None:
    """Return a layer as a projection of its input, or None if the layer has to be called itself."""
    if type(layer) not in (LoRALinear, nn.Linear) or listened_to(layer):
        return None
    if type(layer) is nn.Linear:
        return Projection(layer.weight, bias=layer.bias)
    if layer.backend != "auto":
        return None
    # In training, call the layer, which refuses to run merged.
    if layer.merged:
        return None if layer.training and torch.is_grad_enabled() else Projection(layer.whole_weight(), bias=layer.bias)
    dropout_p = layer.lora_dropout if layer.training else 0.0
    return Projection(layer.whole_weight(), layer.lora_A, layer.lora_B, layer.bias, layer.scaling, dropout_p)
