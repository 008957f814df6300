"""Philox4x32-10 in numpy, from the paper, and the dropout rule on top: independent of torch and of Triton."""

import numpy as np
import torch


def philox4x32(key: tuple[int, int], counter: tuple[np.ndarray, ...], rounds: int = 10) -> tuple[np.ndarray, ...]:
    """Salmon et al. 2011, figure 4: multiply, take high and low halves, exchange, bump the key by the Weyl constants."""
    low32 = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(rounds):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ k[0],
            second & low32,
            (first >> np.uint64(32)) ^ c[3] ^ k[1],
            first & low32,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low32, (k[1] + np.uint64(0xBB67AE85)) & low32]
    return tuple(c)


def keep_mask(seed: int, rows: int, cols: int, p: float, first_byte: int = 0) -> torch.Tensor:
    """The mask of an `[rows, cols]` input: one counter a byte, eight 16-bit halves a counter, low half first."""
    row_bytes = (cols + 31) // 32 * 4
    j = np.arange(rows * row_bytes, dtype=np.uint64) + np.uint64(first_byte)
    zero = np.zeros_like(j)
    words = philox4x32((seed & 0xFFFFFFFF, seed >> 32), (j & np.uint64(0xFFFFFFFF), j >> np.uint64(32), zero, zero))
    halves = np.empty((j.size, 8), np.uint64)
    for i, word in enumerate(words):
        halves[:, 2 * i], halves[:, 2 * i + 1] = word & np.uint64(0xFFFF), word >> np.uint64(16)
    return torch.from_numpy((halves >= round(p * 65536)).reshape(rows, row_bytes * 8)[:, :cols].copy())


def packed(keep: torch.Tensor) -> torch.Tensor:
    """A mask `[rows, cols]` as the kernels store it: int32 words `[rows, ceil(cols / 32)]`, lowest bit first."""
    padded = np.pad(keep.cpu().numpy(), ((0, 0), (0, -keep.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32)).to(keep.device)


def unpacked(words: torch.Tensor, cols: int) -> torch.Tensor:
    """The mask `[rows, cols]` of such words."""
    bits = np.unpackbits(words.cpu().numpy().view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(bits[:, :cols].astype(bool)).to(words.device)
