"""Which tiles of a pipeline are taken both ways is read from what Triton writes."""

import pytest

from lora_kernels.inspect.pipeline import taken_both_ways

BUFFERS = """
    %wide = ttg.local_alloc : () -> !ttg.memdesc<2x16x256xbf16, #shared, #smem, mutable>
    %thin = ttg.local_alloc : () -> !ttg.memdesc<3x16x16xbf16, #shared1, #smem, mutable>
    %b = ttg.local_alloc %b_in : (tensor<256x16xbf16, #blocked>) -> !ttg.memdesc<256x16xbf16, #shared1, #smem>
    %loop:2 = scf.for %step = %c0 to %steps step %c1 iter_args(%acc = %cst) -> (tensor<256x16xf32, #mma>) {
      %wide_1 = ttg.memdesc_index %wide[%at] : !ttg.memdesc<2x16x256xbf16> -> !ttg.memdesc<16x256xbf16>
      %thin_1 = ttg.memdesc_index %thin[%at] : !ttg.memdesc<3x16x16xbf16> -> !ttg.memdesc<16x16xbf16>
      %turned = ttg.memdesc_trans %wide_1 {order = array<i32: 1, 0>} : !ttg.memdesc<16x256xbf16>
"""
BY_TENSOR_CORES = "      %g = ttng.warp_group_dot %turned, %thin_1, %acc {isAsync = true} : !ttg.memdesc<256x16xbf16>\n"
ON_BLACKWELL = "      %g = ttng.tc_gen5_mma %turned, %thin_1, %acc[], %true, %true : !ttg.memdesc<256x16xbf16>\n"
BY_REGISTERS = "      %x = ttg.local_load %wide_1 token %there : !ttg.memdesc<16x256xbf16> -> tensor<16x256xbf16>\n"
B_BY_REGISTERS = "      %y = ttg.local_load %b : !ttg.memdesc<256x16xbf16> -> tensor<256x16xbf16>\n"


@pytest.mark.parametrize("product", [BY_TENSOR_CORES, ON_BLACKWELL], ids=["wgmma", "tcgen05"])
def test_a_tile_taken_both_ways_is_named(product):
    assert taken_both_ways(BUFFERS + product + BY_REGISTERS) == ["2x16x256xbf16"]
    assert taken_both_ways(BUFFERS + BY_REGISTERS + product) == ["2x16x256xbf16"]


@pytest.mark.parametrize(
    "loop", [BY_TENSOR_CORES, BY_TENSOR_CORES * 2, BY_REGISTERS * 2, BY_TENSOR_CORES + B_BY_REGISTERS, ""]
)
def test_a_tile_taken_one_way_is_not(loop):
    assert taken_both_ways(BUFFERS + loop) == []
