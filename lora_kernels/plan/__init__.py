"""Choose the backend that serves a call (`backend`), and the form of the large products (`forms`).

The form follows a model of the GPU (`model`), or the measurements of `lora-kernels tune` (`tuned`, stored by `cache`).
Passes run by plans (`steps`), which keep these decisions for tensors of one kind.
"""

from lora_kernels.plan.backend import (
    BACKENDS,
    MAX_RANK,
    Choice,
    automatic,
    choose,
    contractions,
    is_interpreting,
    requested_backend,
    triton_problem,
)  # fmt: skip
from lora_kernels.plan.forms import (
    Expander,
    Form,
    expander,
    force_form,
    form,
    fuses,
    rule,
    stacks,
)
from lora_kernels.plan.steps import Steps, forget, run

__all__ = [
    "BACKENDS", "MAX_RANK", "Choice", "Expander", "Form", "Steps", "automatic", "choose", "contractions", "expander",
    "force_form", "forget", "form", "fuses", "is_interpreting", "requested_backend", "rule", "run", "stacks",
    "triton_problem",
]  # fmt: skip
