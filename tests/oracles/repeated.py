"""Every pass twice: noted as it runs as written, then taken by these notes; both have to do the same to the last bit."""

import torch

from lora_kernels import plan
from lora_kernels.kernels import _replay
from lora_kernels.kernels.repeat import _kinds


def install(monkeypatch):
    """Put `twice` in the place of `plan.repeat`, for the "triton" backend."""
    monkeypatch.setattr(plan, "repeat", twice)


def twice(backend, pass_, *arguments):
    """Call a pass and repeat it; the second result."""
    if backend == "torch" or _replay.noting():
        return pass_(backend, *arguments)
    given = []
    _kinds(arguments, given)
    before, noise_before = [t.detach().clone() for t in given], _noise(given)
    result, recording = _replay.record(pass_, (backend, *arguments), given)
    if isinstance(recording, str):
        assert "at one address" in recording, recording
        return result
    first, after, noise_after = _bits(result), _bits(given), _noise(given)
    for t, was, own, (_, now) in zip(given, before, _bits(before), after, strict=True):
        if not torch.equal(own[1], now):  # it was added to
            t.detach().copy_(was)
    _set_noise(given, noise_before)
    result = recording(given)
    _same(_bits(result), first, f"{pass_.__module__}.{pass_.__name__}")
    _same(_bits(given), after, "what was given")
    assert torch.equal(_noise(given), noise_after), "as many random numbers are drawn"
    return result


def _bits(value):
    """Every tensor in a result, its geometry and its bits, in order."""
    if isinstance(value, torch.Tensor):
        t = value.detach()
        geometry = (t.shape, t.stride(), t.dtype)
        return [(geometry, t.contiguous().view(torch.uint8).clone() if t.dim() else t.clone())]
    if isinstance(value, (tuple, list)):
        return [own for each in value for own in (_bits(each) if each is not None else [(None, torch.empty(0))])]
    return [(value, torch.empty(0))]


def _same(got, expected, what):
    assert [geometry for geometry, _ in got] == [geometry for geometry, _ in expected], what
    for (geometry, own), (_, other) in zip(got, expected, strict=True):
        assert torch.equal(own, other), f"{what}: {geometry}"


def _noise(given):
    return torch.cuda.get_rng_state() if given[0].is_cuda else torch.get_rng_state()


def _set_noise(given, state):
    (torch.cuda.set_rng_state if given[0].is_cuda else torch.set_rng_state)(state)
