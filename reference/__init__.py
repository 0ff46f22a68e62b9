"""The method as text: every stage of compactattn in plain PyTorch, written to be read beside the paper.

Same names and arguments as the library (less `backend` and `out`), loops allowed, any device, any floating dtype
including float64. It uses the fields of the library's records and nothing else, and derives every count itself.
"""

from reference.attention import attend
from reference.density import count_density
from reference.merge import merge_attn_states
from reference.pipeline import prefill
from reference.quality import (
    QuokaSelection,
    coverage,
    density_cascade,
    output_error,
    past_tokens,
    quoka_attention,
    quoka_select,
)
from reference.selection import select
from reference.summary import summarize
from reference.table import build_table
from reference.union import unite

__all__ = [
    "QuokaSelection",
    "attend",
    "build_table",
    "count_density",
    "coverage",
    "density_cascade",
    "merge_attn_states",
    "output_error",
    "past_tokens",
    "prefill",
    "quoka_attention",
    "quoka_select",
    "select",
    "summarize",
    "unite",
]
