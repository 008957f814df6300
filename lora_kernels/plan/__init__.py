"""Which backend serves a call (`backend`), and in which form it does the large products (`forms`).

The forms go by a model of the GPU (`model`), or by what `lora-kernels tune` measured (`tuned`, stored by `cache`).
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
from lora_kernels.plan.forms import Form, expander, expander_all, forced, forget, form, fuses, repeat, rule, stacks

__all__ = [
    "BACKENDS", "MAX_RANK", "Choice", "Form", "automatic", "choose", "contractions", "expander", "expander_all",
    "forced", "forget", "form", "fuses", "interpreting", "overridden", "repeat", "rule", "stacks", "triton_problem",
]  # fmt: skip
