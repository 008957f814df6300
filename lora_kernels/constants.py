"""Facts that several floors must agree on."""

__all__ = ["ONE_READ_RANK"]

# Up to this rank ds and dB come from one read of dy. Above, the parts of ds weigh as much as a second read.
ONE_READ_RANK = 32
