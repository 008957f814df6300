"""Choose the backend that serves a call (`backend`), and the form of the large products (`forms`).

The form follows a model of the GPU (`model`), or the measurements of `lora-kernels tune` (`tuned`, stored by `cache`).
"""

from lora_kernels.plan.backend import (
    BACKENDS,
    MAX_RANK,
    Choice,
    automatic,
    choose,
    contractions,
    interpreting,
    overridden,
    triton_problem,
)  # fmt: skip
from lora_kernels.plan.forms import (
    Expander,
    Form,
    expander,
    expander_all,
    forced,
    forget,
    form,
    fuses,
    repeat,
    rule,
    stacks,
)

__all__ = [
    "BACKENDS", "MAX_RANK", "Choice", "Expander", "Form", "automatic", "choose", "contractions", "expander",
    "expander_all", "forced", "forget", "form", "fuses", "interpreting", "overridden", "repeat", "rule", "stacks",
    "triton_problem",
]  # fmt: skip
