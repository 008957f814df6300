"""The tile rules that look at a GPU's shared memory: what they pick fits, and for a plain layer it changes stages alone."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels._configs import descriptor_path, shrink_config
from lora_kernels.kernels._launch import facts, shared_per_sm
from lora_kernels.kernels._wgrad_config import WgradCase, wgrad_config

SHARED = (65_536, 102_400, 167_936, 233_472)  # of an MI300X, an RTX 4090, an A100 and an H100
SHAPES = [(rows, width, rank) for rows in (1, 40, 8192) for width in (64, 4096) for rank in (4, 32, 64, 256)]
DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pipelines_fit_the_shared_memory(dtype, shared):
    in_registers = 1 if shared == 65_536 else 0  # AMD's pipelines keep a stage there
    for rows, width, rank in SHAPES:
        for dropout in (False, True):
            tile = shrink_config(rows, width, rank, dtype, dropout, shared=shared)
            taken = (tile.num_stages - in_registers) * tile.block_k * (tile.block_m + tile.block_r) * dtype.itemsize
            assert taken * (2 if rank <= 32 else 1) <= shared
        for shrinks in (False, True)[: 1 + (rank <= 32)]:
            tile = wgrad_config(WgradCase(rows, width, rank, dtype, shrinks, shared=shared))
            taken = (tile.num_stages - in_registers) * tile.block_m * (tile.block_c + tile.block_r) * dtype.itemsize
            assert taken <= shared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_memory_changes_stages_alone(dtype):
    stages = set()
    for rows, width, rank in SHAPES:
        shape = rows, width, rank, dtype
        for tiles in (
            [shrink_config(*shape, shared=shared) for shared in SHARED],
            [wgrad_config(WgradCase(*shape, shared=shared)) for shared in SHARED],
        ):
            assert len({replace(tile, num_stages=0) for tile in tiles}) == 1  # so every GPU adds up in the same order
            assert sorted(tile.num_stages for tile in tiles) == [tile.num_stages for tile in tiles]
            stages |= {tile.num_stages for tile in tiles}
    assert stages == ({2, 3, 4} if dtype == torch.bfloat16 else {2, 4})


def test_a_gpu_that_is_not_there_has_the_memory_of_the_default():
    assert shared_per_sm(torch.device("cpu")) == SHARED[-1]


@pytest.mark.parametrize(
    ("capability", "dtype", "tma"),
    [
        (None, torch.bfloat16, False),
        ((8, 0), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((10, 0), torch.float16, True),
        ((12, 0), torch.bfloat16, False),  # Blackwell's desktop cards have the descriptors, not the memory
    ],
    ids=str,
)
def test_descriptors_where_their_tiles_fit(capability, dtype, tma):
    assert descriptor_path(capability, dtype)[0] == tma


@pytest.mark.parametrize(("rows", "splits"), [(8192, 7), (512, 1), (16, 1)])
def test_made_operands_fill_the_multiprocessors_round_by_round(rows, splits):
    """112 tiles leave a seventh of 132 multiprocessors idle, seven times as many next to none; few rows repay no parts."""
    case = WgradCase(rows, 14336, 16, torch.bfloat16, shrinks=True, adapters=3, activated=True, num_sms=132)
    tile = wgrad_config(case)
    assert -(-rows // tile.rows_per_split) == splits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_program_walks_rows_that_are_not_there(dtype):
    for rows in (1, 16, 17, 100, 1000):
        tile = wgrad_config(WgradCase(rows, 4096, 16, dtype))
        assert tile.rows_per_split < rows + tile.block_m
        assert shrink_config(rows, 100, 16, dtype).k_per_split <= 128


@pytest.mark.parametrize("rows", [1, 16, 32, 33, 64, 65])
def test_ds_and_dB_of_few_rows_are_no_pipeline(rows):
    """Of fewer than 64 rows ds takes its tile from registers and dB from shared memory: see docs/traps.md."""
    tile = wgrad_config(WgradCase(rows, 4096, 16, torch.bfloat16, shrinks=True))
    assert tile.num_stages == 1 if rows <= 64 else tile.block_m == 64 and tile.num_stages > 1


@pytest.mark.parametrize("made", [dict(masked=True), dict(activated=True)], ids=["masked", "made"])
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_rows_off_16_elements_are_no_wgmma_from_registers(made, rank):
    """A masked or made tile is in registers, which ptxas may overwrite where it is loaded by element: docs/traps.md."""
    case = WgradCase(8192, 4096, rank, torch.bfloat16, **made)
    single = case._replace(dtype=torch.float32)
    aligned, unaligned = wgrad_config(case), wgrad_config(case._replace(unaligned=True))
    assert unaligned.block_c == 32 <= aligned.block_c
    assert wgrad_config(single) == wgrad_config(single._replace(unaligned=True))


def test_a_launch_knows_what_triton_loads_by_element():
    wide = torch.zeros(64, 96, dtype=torch.bfloat16)
    for t, by_element in (
        (wide, False), (wide[:, :40], True), (wide[:, 1:17], True), (wide[:, ::2], True), (wide[:, :32], False),
        (torch.zeros(64, 40), True), (wide.t(), False),
    ):  # fmt: skip
        assert facts(t).by_element() == by_element, (t.shape, t.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("made", [{}, dict(activated=True, shrinks=True, adapters=3)], ids=["given", "made"])
def test_a_split_is_a_whole_number_of_blocks(made, dtype):
    """A program walks whole blocks: of a share that is none, the last rows would be in nobody's sum, or in two."""
    shares = set()
    for size in (1, 100, 1000, 4097, 8192, 50_000, 100_003, 1_000_000):
        for width, rank in ((64, 4), (1000, 16), (4096, 64), (14_336, 256)):
            for sms in (3, 108, 132):
                tile = wgrad_config(WgradCase(size, width, rank, dtype, num_sms=sms, **made))
                assert tile.rows_per_split % tile.block_m == 0
                shares.add(tile.rows_per_split // tile.block_m)
            tile = shrink_config(width, size, rank, dtype)
            assert tile.k_per_split % tile.block_k == 0
            tile = shrink_config(1, size, rank, dtype)
            assert tile.k_per_split % tile.block_k == 0
    assert len(shares) > 10
