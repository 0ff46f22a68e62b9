"""`python -m benchmarks ttft`: what sparse prefill saves of a whole model's time to the first token.

The module stack of transformers with random weights, chunk after chunk over a growing KV cache, dense attention and
this library in the same stack on the same cache. Random weights have no attention pattern: the selection runs and is
timed, and the calibrated workload's block tables are then used in place of what it chose.
"""
