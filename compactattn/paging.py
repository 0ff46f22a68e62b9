"""How a contiguous cache can be seen as pages without a copy: `PagedKV.from_contiguous`."""

from __future__ import annotations

from math import gcd

from torch import Tensor


def page_strides(k: Tensor, v: Tensor, page_size: int) -> tuple[int, int, int, int] | None:
    """See [B, L, Hkv, D] as pages: (page stride of k, page stride of v, id step per request, id step per page).

    The page stride is the greatest common divisor of the distance between requests and that between pages, so
    every page of every request has an id; None where k and v would need different ids.
    """
    requests = k.shape[0]
    strides = []
    for tensor in (k, v):
        between_requests = tensor.stride(0) if requests > 1 else 0
        between_pages = page_size * tensor.stride(1)
        if between_pages == 0:
            return None
        unit = gcd(between_requests, between_pages)
        strides.append((unit, between_requests // unit, between_pages // unit))
    (unit_k, *ids_k), (unit_v, *ids_v) = strides
    if ids_k != ids_v:
        return None
    return unit_k, unit_v, ids_k[0], ids_k[1]
