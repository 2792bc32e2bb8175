"""The loss head as fused Triton kernels: Hopper and Blackwell, or Triton's interpreter on a CPU for their tests.

`kernels.py` and `rows.py` hold the kernels, `launch.py` calls them, `head.py` is `loss/logprobs.py` on top of them,
`aot.py` compiles every kernel for sm_90 and sm_100 without a GPU. Nothing outside this package imports triton.
"""
