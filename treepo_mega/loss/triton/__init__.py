"""The loss head as fused Triton kernels: Hopper and Blackwell, or Triton's interpreter on a CPU for their tests.

`kernels.py` and `rows.py` hold the kernels, `launch.py` calls them, `head.py` is `loss/logprobs.py` on top of them,
`tools/bench/kernel_aot.py` compiles them for sm_90 and sm_100 without a GPU. Nothing else here imports triton.
"""
