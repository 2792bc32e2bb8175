"""All contact with vLLM. No other folder imports it. `README.md` in this folder lists the private names of vLLM
that are touched here: a version bump must re-check each, and `tests/engine/test_private_names.py` does so first.

    engine.py         submit, step, score; weights change in place
    stream.py         what was asked for, and where a segment ends
    vllm_setup.py     vLLM's settings; what building it does to the process is put right
    vllm_target.py    a worker's parameters as the destination of a reshard
    branch_cache.py   branches that begin inside a KV block
    cuda_profile.py   CUDA's scheduler and model runner on a CPU, for tests
"""
