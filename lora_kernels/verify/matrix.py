"""All cases of `lora-kernels verify`, of layers, of blocks and of groups, and the result of a case."""

from dataclasses import dataclass
from typing import TypeAlias

import torch

from lora_kernels.constants import DTYPES
from lora_kernels.verify import block_matrix, grouped_matrix, layer_matrix
from lora_kernels.verify.block_matrix import BlockCase
from lora_kernels.verify.grouped_matrix import GroupedCase
from lora_kernels.verify.layer_matrix import LayerCase
from lora_kernels.verify.numerics import Finding

__all__ = ["AnyCase", "Result", "examine", "matrix"]

AnyCase: TypeAlias = LayerCase | BlockCase | GroupedCase


@dataclass(frozen=True)
class Result:
    """The outcome of a case.

    Attributes:
        ok: Whether every check held.
        rule_1: Largest share of rule 1's limit that any output used.
        rule_2: Largest share of rule 2's limit; None if no output is large enough.
        message: What is wrong, or "".
        findings: The findings of all outputs.
    """

    ok: bool
    rule_1: float
    rule_2: float | None
    message: str
    findings: list[Finding]


def matrix(backend: str, dtype: str, on_gpu: bool, quick: bool) -> list[AnyCase]:
    """List the cases of a backend and a dtype, layers first."""
    kinds = layer_matrix, block_matrix, grouped_matrix
    return [case for kind in kinds for case in kind.matrix(backend, dtype, on_gpu, quick)]


def examine(case: AnyCase, device: torch.device, seed: int) -> Result:
    """Run a case twice and hold it to the rules."""
    if isinstance(case, BlockCase):
        findings, messages = block_matrix.examine(case, DTYPES[case.dtype], device, seed)
    elif isinstance(case, GroupedCase):
        findings, messages = grouped_matrix.examine(case, device, seed)
    else:
        findings, messages = layer_matrix.examine(case, device, seed)
    messages = [finding.message for finding in findings if not finding.ok] + messages
    rule_2 = max((finding.rule_2 for finding in findings if finding.rule_2 is not None), default=None)
    return Result(not messages, max(finding.rule_1 for finding in findings), rule_2, "; ".join(messages), findings)
