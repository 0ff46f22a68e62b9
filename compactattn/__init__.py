"""compactattn: minimal block tables for chunked prefill over a paged KV cache."""

from compactattn.attention import attend
from compactattn.check import check
from compactattn.data import BlockTable, GateKeys, GroupMask, KVSummary, PagedKV, PrefillBatch, SelectionMask
from compactattn.density import DensityCounters, count_density
from compactattn.grouping import Grouping, grouping_of
from compactattn.merge import merge_attn_states
from compactattn.pipeline import prefill, select_table
from compactattn.seer_gate import load_seer_gates
from compactattn.selection import select
from compactattn.selectors import Dense, FlashPrefill, KeyBounds, Oracle, SeerGate, Selector, XAttention
from compactattn.summary import summarize
from compactattn.table import build_table
from compactattn.union import unite

__version__ = "0.1.0"

__all__ = [
    "BlockTable",
    "Dense",
    "DensityCounters",
    "FlashPrefill",
    "GateKeys",
    "GroupMask",
    "Grouping",
    "KVSummary",
    "KeyBounds",
    "Oracle",
    "PagedKV",
    "PrefillBatch",
    "SeerGate",
    "SelectionMask",
    "Selector",
    "XAttention",
    "__version__",
    "attend",
    "build_table",
    "check",
    "count_density",
    "grouping_of",
    "load_seer_gates",
    "merge_attn_states",
    "prefill",
    "select",
    "select_table",
    "summarize",
    "unite",
]
