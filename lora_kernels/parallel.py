"""Tensor parallelism: styles that shard a `LoRALinear`, for PyTorch's `parallelize_module`.

    parallelize_module(model, mesh, {"up": LoRAColwise(), "down": LoRARowwise()})

Column-wise, each rank computes its own rows of W and B, that is, its own features of y, from all of x:

    yᵢ = x Wᵢᵀ + s Bᵢᵀ + biasᵢ,    s = scaling · D(x) Aᵀ            W, B, bias in shards; A on every rank

Row-wise, each rank has its own features of x, and of W and A the columns that meet them:

    y = Σᵢ (xᵢ Wᵢᵀ + sᵢ Bᵀ) + bias,    sᵢ = scaling · D(xᵢ) Aᵢᵀ     W, A in shards; B, bias on every rank

y is linear in s, so s is never gathered: the sum over the ranks is the sum that a row-wise linear layer has anyway. For
a tensor that every rank holds (x, A, B or a bias), each rank computes a part of the gradient, and backward adds up the
parts.

`lora_linear` computes the products on plain tensors, and DTensor communicates. The parameters are DTensors, so that
optimizers, `fully_shard` over another dim of the mesh and `torch.distributed.checkpoint` work with them as usual.
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from lora_kernels.modules.linear import LoRALinear
from lora_kernels.quantized import QuantizedWeight

__all__ = ["LoRAColwise", "LoRARowwise"]


class _LoRAStyle(ParallelStyle):
    """The common part of both styles; they differ in `shards`, and in the layouts of x and y."""

    # The sharded parameters and their dims; every rank holds the whole of each other parameter.
    shards: dict[str, int]
    # The layouts of x and of y.
    takes: Placement
    gives: Placement

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if layout is not None and not isinstance(layout, Placement):
                raise TypeError(
                    f"{type(self).__name__}: {name} must be a Placement, as Shard(1), got {type(layout).__name__}."
                )
        self.input_layout = input_layouts or self.takes
        self.output_layout = output_layouts or (Replicate() if self.gives.is_partial() else self.gives)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style = type(self).__name__
        if type(module) is not LoRALinear:
            raise TypeError(f"{style}: expected a LoRALinear, got {type(module).__name__}.")
        if module.merged:
            raise RuntimeError(f"{style}: LoRALinear is merged; call unmerge() before parallelizing it.")
        if isinstance(module.whole_weight(), QuantizedWeight):
            raise TypeError(
                f"{style}: weight is quantised, and its blocks would lie across ranks; leave the layer whole."
            )
        parameters = dict(module.named_parameters())
        ranks = device_mesh.size()
        for name, dim in self.shards.items():
            if name in parameters and parameters[name].shape[dim] % ranks:
                raise ValueError(
                    f"{style}: dim {dim} of {name} is {parameters[name].shape[dim]}, which {ranks} ranks cannot share "
                    f"equally. Choose a mesh whose size divides it."
                )
        for name, t in parameters.items():
            placement = Shard(self.shards[name]) if name in self.shards else Replicate()
            t_shard = distribute_tensor(t, device_mesh, [placement], src_data_rank=self.src_data_rank)
            setattr(module, name, nn.Parameter(t_shard, requires_grad=t.requires_grad))
        # `_style` belongs to the class that the module gets on this line.
        module.__class__, module._style = _ParallelLoRALinear, self  # type: ignore[assignment]
        return module


class LoRAColwise(_LoRAStyle):
    """Shard the output features of a `LoRALinear`, as `ColwiseParallel` does those of an `nn.Linear`.

    Args:
        input_layouts: Layout of x on the ranks; replicated if None. x in another layout is gathered.
        output_layouts: Layout of y; sharded along the last dim if None.
        use_local_output: Whether y is this rank's plain tensor or a DTensor.

    With dropout, ranks whose generators are seeded alike draw the same mask.

    Raises:
        TypeError: A layout is not a `Placement`; or, from `parallelize_module`, the module is not a `LoRALinear`.
        ValueError: From `parallelize_module`, the ranks cannot share the features equally.
        RuntimeError: From `parallelize_module`, the module is merged.
    """

    shards, takes, gives = {"weight": 0, "lora_B": 0, "bias": 0}, Replicate(), Shard(-1)


class LoRARowwise(_LoRAStyle):
    """Shard the input features of a `LoRALinear`, as `RowwiseParallel` does those of an `nn.Linear`.

    Args:
        input_layouts: Layout of x on the ranks; sharded along the last dim if None. x in another layout is
            redistributed.
        output_layouts: Layout of y; replicated if None. `Shard(1)` for sequence parallelism.
        use_local_output: Whether y is this rank's plain tensor or a DTensor.

    With dropout, ranks whose generators are seeded alike draw independent masks, and their generators stay alike.

    Raises:
        TypeError, ValueError, RuntimeError: As `LoRAColwise`.
    """

    shards, takes, gives = {"weight": 1, "lora_A": 1}, Shard(-1), Partial()


class _ParallelLoRALinear(LoRALinear):
    """A `LoRALinear` whose parameters are DTensors over one mesh dim: computes this rank's part, and communicates."""

    weight: DTensor
    bias: DTensor | None
    lora_A: DTensor
    lora_B: DTensor
    _style: _LoRAStyle

    def forward(self, x: Tensor) -> Tensor:
        style, mesh = self._style, self.weight.device_mesh
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [style.input_layout], run_check=False)
        weight, lora_A, lora_B = (_local(t, t.placements[0]) for t in (self.weight, self.lora_A, self.lora_B))
        bias, shard = None if self.bias is None else _local(self.bias, self.bias.placements[0]), (0, 1)
        if style.gives.is_partial():
            shard = mesh.get_local_rank(), mesh.size()
            # Only rank 0 adds the bias; each rank's gradient is a part.
            bias = None if bias is None else bias * (shard[0] == 0)
        y = self._compute(_local(x, style.takes), weight, lora_A, lora_B, bias, dropout_shard=shard)
        y = DTensor.from_local(y, mesh, [style.gives], run_check=False)
        y = y.redistribute(placements=[style.output_layout])
        return y.to_local() if style.use_local_output else y


def _local(t: DTensor, placement: Placement) -> Tensor:
    """Return this rank's part of a tensor in a layout; a replicated tensor gets partial gradients, which are added up.

    If t already has the layout, `redistribute` only adds up the gradients, in backward.
    """
    t = t.redistribute(placements=[placement])
    return t.to_local(grad_placements=[Partial() if at.is_replicate() else at for at in t.placements])
