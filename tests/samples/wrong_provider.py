"""A plugin of pytest (`-p wrong_provider`): the addmm chain of a layer is off by one part in a hundred."""

from dataclasses import replace

from lora_kernels.bench.providers import layer

_right = layer.PROVIDERS["addmm"]


def _wrong(problem, backend):
    provider = _right(problem, backend)
    return replace(provider, forward=lambda: 1.01 * provider.forward())


layer.PROVIDERS["addmm"] = _wrong
