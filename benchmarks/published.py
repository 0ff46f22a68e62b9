"""Figures that others published, to stand beside measured ones: never mixed with them, always labelled."""

from __future__ import annotations

#: CompactAttention (arXiv 2605.16839): speedup over dense of the attention module, projections included, on an H200
#: with tensor parallelism 2, batch 8, chunk 1024, by prompt length.
PAPER_SPEEDUPS: dict[str, dict[int, float]] = {
    "QUOKA": {32 * 1024: 0.90, 64 * 1024: 0.99, 128 * 1024: 1.09},
    "XAttention": {32 * 1024: 0.54, 64 * 1024: 0.60, 128 * 1024: 0.64},
    "SeerAttention": {32 * 1024: 0.44, 64 * 1024: 0.54, 128 * 1024: 0.65},
    "CompactAttention-SA": {32 * 1024: 0.95, 64 * 1024: 1.36, 128 * 1024: 1.89},
    "FlashPrefill": {32 * 1024: 1.21, 64 * 1024: 1.56, 128 * 1024: 2.24},
    "CompactAttention-FP": {32 * 1024: 1.27, 64 * 1024: 1.79, 128 * 1024: 2.72},
}
PAPER_SOURCE = "published, arXiv 2605.16839: whole attention module, projections included, against its own dense"
#: The same paper and setting: speedup over dense end to end, by prompt length.
PAPER_END_TO_END: dict[str, dict[int, float]] = {
    "CompactAttention-FP": {32 * 1024: 1.13, 64 * 1024: 1.39, 128 * 1024: 1.96},
}
PAPER_END_TO_END_SOURCE = "published, arXiv 2605.16839: end to end, against its own dense"
PAPER_SHAPE = {"batch": 8, "q_heads": 16, "kv_heads": 4}

#: The same paper's Table 1: RULER accuracy in percent, mean over the tasks, chunk 1024, by model, method and length.
PAPER_RULER: dict[str, dict[str, dict[int, float]]] = {
    "Llama-3.1-8B": {
        "dense": {32 * 1024: 88.23, 64 * 1024: 83.52, 128 * 1024: 76.59},
        "QUOKA": {32 * 1024: 83.52, 64 * 1024: 79.99, 128 * 1024: 70.44},
        "XAttention": {32 * 1024: 89.16, 64 * 1024: 83.27, 128 * 1024: 74.50},
        "SeerAttention": {32 * 1024: 90.23, 64 * 1024: 83.82, 128 * 1024: 73.34},
        "CompactAttention-SA": {32 * 1024: 88.92, 64 * 1024: 84.12, 128 * 1024: 74.28},
        "FlashPrefill": {32 * 1024: 88.99, 64 * 1024: 83.94, 128 * 1024: 74.12},
        "CompactAttention-FP": {32 * 1024: 88.77, 64 * 1024: 83.96, 128 * 1024: 74.17},
    },
    "Qwen3-30B-A3B": {
        "dense": {32 * 1024: 93.01, 64 * 1024: 90.56, 128 * 1024: 87.81},
        "QUOKA": {32 * 1024: 81.96, 64 * 1024: 79.57, 128 * 1024: 79.03},
        "CompactAttention-FP": {32 * 1024: 92.41, 64 * 1024: 88.43, 128 * 1024: 87.03},
    },
}
