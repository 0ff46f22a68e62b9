"""Stage 3: from united masks to minimal block tables."""

from __future__ import annotations

import torch

from compactattn import operators
from compactattn.data import BlockTable, GroupMask
from compactattn.dispatch import resolve_backend
from compactattn.validation import check_record, fail


def build_table(groups: GroupMask, *, backend: str | None = None) -> BlockTable:
    """List the blocks that each row keeps, in strictly ascending order.

    Args:
        groups: keep bool [R, Kb] and rows int32 [B, Hq, Qb].
        backend: None (by device), "triton" or "numba".

    Returns:
        BlockTable: indices int32 [R, Kb], the first counts[r] valid and the rest unspecified; counts int32 [R].

    Raises:
        ValueError: another record than a GroupMask, one without any row, or a backend that cannot run here.
    """
    if torch.compiler.is_compiling():
        return operators.call("build_table", groups=groups, backend=backend)
    check_record("groups", groups, "GroupMask")
    if groups.rows.numel() and not groups.keep.shape[0]:
        raise fail("groups.keep", "at least the rows that groups.rows uses", "none")
    chosen = resolve_backend(backend, groups.keep.device)
    if chosen == "triton":
        from compactattn._triton.table import build_table as run
    else:
        from compactattn._numba.table import build_table as run
    return run(groups)
