"""Read a request's paged cache in units: the runs of tokens that lie together both in a page and in a KV block."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from compactattn.data import PagedKV


class Places(NamedTuple):
    """Where units lie, int64 [n] each: the page's id, and the unit's place among the units of that page."""

    pages: Tensor
    slots: Tensor


def locate_units(kv: PagedKV, request: int, units: Tensor, unit: int) -> Places:
    """Look up units of a request; unit u holds its tokens from u * unit on. Other pages' ids are not read.

    Args:
        units: int64 [n].
        unit: tokens per unit, a divisor of the page size.
    """
    per_page = kv.page_size // unit
    pages = kv.page_table[request].index_select(0, units // per_page).long()
    return Places(pages, units % per_page)


def in_units(cache: Tensor, unit: int) -> Tensor:
    """See a cache [num_pages, page_size, ...] of any strides as [num_pages, page_size // unit, unit, ...]."""
    return cache.unflatten(1, (-1, unit))


def gather(cache: Tensor, places: Places, scale: Tensor | None = None) -> Tensor:
    """Copy units out of [num_pages, page_size // unit, unit, ...] to float32 [n, unit, ...].

    `scale` is what an FP8 cache's numbers count in: float32 [Hkv] for a cache [..., Hkv, D], one number for [..., D].
    """
    rows = cache[places.pages, places.slots].float()
    return rows if scale is None else rows.mul_(scale[..., None])


def of_head(scale: Tensor | None, kv_head: int) -> Tensor | None:
    """One KV head's number of the scales [Hkv] of an FP8 cache; None for other caches."""
    return None if scale is None else scale[kv_head]
