"""In the place of FlashAttention's kernels: attention files import it, Triton's attention never calls it."""
