"""SwiGLU: silu(gate) * up. Source: Shazeer 2020."""

from mindspore.ops.auto_generate import SiLU


def reference():
    """gate and up of one shape -> that shape."""
    silu = SiLU()

    def swiglu(gate, up):
        return silu(gate) * up

    return swiglu
