"""Memory with something about it: a page that may not be touched behind a tensor, more than 2^31 elements of nothing."""

import ctypes
import ctypes.util
import mmap

import torch


def _map(size, protection):
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    private_anonymous_noreserve = 0x02 | 0x20 | 0x4000
    address = libc.mmap(None, size, protection, private_anonymous_noreserve, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return libc, address


def before_guard_page(t):
    """A copy whose last byte touches a page that may not be read."""
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    libc, address = _map(pages + mmap.PAGESIZE, 3)
    libc.mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0)
    raw = (ctypes.c_char * size).from_address(address + pages - size)
    return torch.frombuffer(raw, dtype=t.dtype).view(t.shape).copy_(t)


def virtual(rows, row_stride, cols, col_stride):
    """A tensor spread over more than 2^31 elements of address space, a few pages of which exist."""
    span = (rows - 1) * row_stride + (cols - 1) * col_stride + 1
    _, address = _map(span * 4, 3)
    raw = (ctypes.c_char * (span * 4)).from_address(address)
    return torch.frombuffer(raw, dtype=torch.float32).as_strided((rows, cols), (row_stride, col_stride))
