"""Registers of a product on its way, in machine code written by hand."""

import pytest

from lora_kernels.inspect.hgmma import find_overwrites

_PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR20].tnspB, R24"
_WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*lines):
    """Lines as nvdisasm prints them; those that end with a colon are labels."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("between", "hit"),
    [
        ("IMAD.MOV.U32 R40, RZ, RZ, R8", "R40"),
        ("@P3 IADD3 R43, P3, R8, UR10, RZ", "R43"),
        ("LDSM.16.M88.4 R36, [R6]", ""),
        ("LDSM.16.M88.4 R37, [R6]", "R40"),
        ("IMAD.WIDE R38, R15, 0x20, R8", ""),
        ("IMAD.WIDE R42, R15, 0x20, R8", "R42, R43"),
        ("LDS.128 R32, [R8]", ""),
        ("LDS.64 R39, [R8]", "R40"),
        ("HMMA.16816.F32.BF16 R40, R4, R8, R40", "R40, R41, R42, R43"),
        ("SHFL.IDX PT, R41, R8, RZ, 0x1f", "R41"),
        ("ISETP.GE.AND P4, PT, R40, UR21, PT", ""),
        ("STS.128 [R40], R40", ""),
        ("STG.E desc[UR16][R40.64], R41", ""),
        ("LDGSTS.E [R40+0x1000], desc[UR16][R40.64], P3", ""),
    ],
)
def test_what_is_written_before_the_wait_is_found(between, hit):
    found = find_overwrites(listing(f"{_PRODUCT}, gsb0", between, _WAIT, "MOV R40, R1", "EXIT"))
    assert [line.split(" of ")[0].split(" writes ")[1] for line in found] == [hit] * bool(hit)


def test_a_group_ends_at_its_last_product_and_a_wait_may_leave_younger_groups():
    first, second = _PRODUCT.replace("R40", "R48"), f"{_PRODUCT}, gsb0"
    younger = "HGMMA.64x16x16.F32.BF16 R64, R72, gdesc[UR20], R64, gsb0"
    partly = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    # the wait leaves one group on its way: the only one
    assert find_overwrites(listing(first, second, partly, "MOV R48, R1", _WAIT, "EXIT"))
    # and here the younger one
    assert not find_overwrites(listing(first, second, younger, partly, "MOV R48, R1", "MOV R41, R1", _WAIT, "EXIT"))
    assert find_overwrites(listing(first, second, younger, partly, "MOV R73, R1", _WAIT, "EXIT"))


def test_branches_are_followed_both_ways():
    loop = [".L_x_0:", "LDSM.16.M88.4 R40, [R6]", f"{_PRODUCT}, gsb0", "@P3 BRA `(.L_x_0)", _WAIT, "EXIT"]
    assert len(find_overwrites(listing(*loop))) == 1
    waited = [".L_x_0:", _WAIT, *loop[1:]]
    assert not find_overwrites(listing(*waited))
    skipped = [f"{_PRODUCT}, gsb0", "BRA `(.L_x_1)", "MOV R40, R1", ".L_x_1:", _WAIT, "EXIT"]
    assert not find_overwrites(listing(*skipped))


def test_products_from_shared_memory_have_no_registers_to_keep():
    product = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR20].tnspB, R24, gsb0"
    assert not find_overwrites(listing(product, "MOV R40, R1", _WAIT, "EXIT"))
