"""A control for compute-sanitizer's racecheck: about the smallest kernel that Gluon's `warp_specialize` makes.

    compute-sanitizer --tool racecheck python -m tests.warp_specialised

A producer warp stores a record and copies a tile by TMA, a consumer waits for both on one mbarrier and writes the tile
out. Racecheck takes the handshake that Triton puts around the partitions, and what an mbarrier orders, for hazards
here too; so such reports on the Hopper kernel, which is made of the same parts, are no evidence against it.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compactattn._triton.gluon_names import async_load, barrier
from compactattn._triton.hopper_copies import RECORD, item_value, put_item

SIDE = gl.constexpr(64)


@gluon.jit
def _produce(desc, tile, number, ready, free, tiles):
    field = gl.arange(0, RECORD, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    for n in range(tiles):
        mbarrier.wait(free, (n & 1) ^ 1)
        put_item(number, field + n, n)
        barrier()
        mbarrier.expect(ready, SIDE * SIDE * 2)
        async_load(desc, [n * SIDE, 0], ready, tile)


@gluon.jit
def _consume(out, tile, number, ready, free, tiles):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    column = gl.arange(0, SIDE, gl.SliceLayout(0, layout))
    for n in range(tiles):
        mbarrier.wait(ready, n & 1)
        first_row = item_value(number, 0) * SIDE
        values = tile.load(layout)
        mbarrier.arrive(free, count=1)
        gl.store(out + gl.expand_dims((first_row + row) * SIDE, 1) + gl.expand_dims(column, 0), values)


@gluon.jit
def _copy_kernel(desc, out, tiles):
    tile = gl.allocate_shared_memory(gl.bfloat16, [SIDE, SIDE], gl.NVMMASharedLayout(128, 16, rank=2))
    number = gl.allocate_shared_memory(gl.int32, [RECORD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(free, count=1)
    fence_async_shared()
    consumer = (out, tile, number, ready, free, tiles)
    gl.warp_specialize([(_consume, consumer), (_produce, (desc, tile, number, ready, free, tiles))], [1], [24])


def main() -> None:
    rows = torch.randn(4 * SIDE.value, SIDE.value, device="cuda", dtype=torch.bfloat16)
    copy = torch.empty_like(rows)
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    _copy_kernel[(1,)](TensorDescriptor.from_tensor(rows, [SIDE.value] * 2, layout), copy, 4, num_warps=4)
    assert torch.equal(rows, copy)
    print("copied as it should be")


if __name__ == "__main__":
    main()
