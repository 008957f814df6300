"""Each launch of a layer alone, shrink, matmul_expand and wgrad, beside PyTorch's best operators for the same work."""

OPERATION = "contractions"


def test_contractions(timed, admitted):
    timed(admitted, "forward")  # a launch has one pass
