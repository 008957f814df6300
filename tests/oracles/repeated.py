"""Every pass twice: as it is written, and by the notes taken of it; both have to do the same to the last bit.

By the notes it has other tensors: each in a memory of its own, however they lay together when it was noted.
"""

import torch

from lora_kernels import plan
from lora_kernels.kernels import _replay
from lora_kernels.kernels.repeat import _kinds, _resolved, _told_apart


def install(monkeypatch):
    """Put `twice` in the place of `plan.repeat`, for the "triton" backend."""
    monkeypatch.setattr(plan, "repeat", twice)


def twice(backend, pass_, *arguments):
    """Call a pass, repeat it with copies of all it was given, and compare; the first result."""
    if backend == "torch" or _replay.noting():
        return pass_(backend, *arguments)
    given, arguments = [], [_resolved(argument) for argument in arguments]
    kinds = _kinds(arguments, given)
    if not _told_apart(given):
        return pass_(backend, *arguments)
    noise, others = _noise(given), list(map(_elsewhere, given))
    result, recording = _replay.record(pass_, (backend, *arguments), given)
    assert isinstance(recording, _replay.Recording), recording
    noise_after = _noise(given)
    _set_noise(given, noise)
    rest = []
    assert _kinds(others, rest) == _kinds(given, []), f"copies of another kind than {kinds}"
    name = f"{pass_.__module__}.{pass_.__name__}"
    _same(_bits(recording(others)), _bits(result), name)
    _same(_bits(others), _bits(given), f"what {name} was given")
    assert torch.equal(_noise(given), noise_after), "as many random numbers are drawn"
    return result


def _elsewhere(t):
    """The same tensor in another memory, as far from 16 bytes as it is."""
    t = t.detach()
    storage = t.untyped_storage()
    shift = t.data_ptr() % 16 - t.storage_offset() * t.itemsize % 16
    memory = torch.empty(storage.nbytes() + 32, dtype=torch.uint8, device=t.device)
    start = (shift - memory.data_ptr()) % 16
    memory[start : start + storage.nbytes()] = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
    offset, rest = divmod(start, t.itemsize)
    assert not rest
    other = torch.empty(0, dtype=t.dtype, device=t.device)
    return other.set_(memory.untyped_storage(), offset + t.storage_offset(), t.shape, t.stride())


def _bits(value):
    """Every tensor in a result, its geometry and its bits, in order."""
    if isinstance(value, torch.Tensor):
        t = value.detach()
        return [((t.shape, t.stride(), t.dtype), t.contiguous().view(torch.uint8) if t.dim() else t.clone())]
    if isinstance(value, (tuple, list)):
        return [own for each in value for own in _bits(each)]
    return [(value, torch.empty(0))]


def _same(got, expected, what):
    assert [geometry for geometry, _ in got] == [geometry for geometry, _ in expected], what
    for (geometry, own), (_, other) in zip(got, expected, strict=True):
        assert torch.equal(own, other), f"{what}: {geometry}"


def _noise(given):
    return torch.cuda.get_rng_state() if given[0].is_cuda else torch.get_rng_state()


def _set_noise(given, state):
    (torch.cuda.set_rng_state if given[0].is_cuda else torch.set_rng_state)(state)
