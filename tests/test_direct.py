"""Triton's C function called without Triton's Python: it is given what Triton would give it.

`.ci/run` runs this file twice, as `test_compile.py`: what is read from Triton's launcher can be tested with 3.6 alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from compactattn._triton import direct
from compactattn._triton.direct import MOST_MAPS, TensorMaps, entry_of
from compactattn._triton.recording import Recording

CPU = torch.device("cpu")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
WHERE_IT_WAS_READ = pytest.mark.skipif(VERSION not in direct.DIRECT_VERSIONS, reason="another launcher than was read")


class CFunction:
    """Notes what it is given, like the C function of a launcher: not a function of Python."""

    def __call__(self, *args: object) -> None:
        self.args = args


def frozen(value: Any) -> Any:
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What CUtensorMaps were made of; a map is the tuple of that."""
    made: list[Any] = []

    def fill(*how: Any) -> Any:
        made.append(frozen(how))
        return made[-1]

    utils = SimpleNamespace(fill_tma_descriptor=fill)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=utils))
    direct._maps.cache_clear()
    return made


def way(box: list[int], **changes: Any) -> dict[str, Any]:
    """How a descriptor was compiled, as Triton's metadata say it."""
    return {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": box, "fp4_padded": False, **changes}


def make_kernel(args: tuple[Any, ...], ways: list[dict[str, Any] | None], **changes: Any) -> Any:
    """A compiled kernel with Triton's own launcher in front of a C function that takes notes."""
    from triton.backends.nvidia import driver as nvidia

    kinds = ["tensordesc<bf16[1,64]>" if hasattr(arg, "block_shape") else "i32" for arg in args]
    c_function = CFunction()
    launcher = object.__new__(nvidia.CudaLauncher)
    attributes = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": True}
    for scratch in ("global_scratch", "profile_scratch"):
        attributes |= {f"{scratch}_size": 0, f"{scratch}_align": 1}
    wrapped = nvidia.wrap_handle_tensordesc(c_function, dict(enumerate(kinds)), ways or None)
    vars(launcher).update(attributes | changes, launch=wrapped)
    return SimpleNamespace(run=launcher, function=0xF00, packed_metadata=(4, 1, 1000), c_function=c_function)


def make_args() -> tuple[list[torch.Tensor], torch.Tensor, tuple[Any, ...]]:
    """(inputs, a scratch tensor, the arguments of a kernel with descriptors of both among them)."""
    inputs, scratch = [torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(9)], torch.zeros(300, dtype=torch.bfloat16)
    of_input = TensorDescriptor.from_tensor(inputs[0], [1, 64])
    of_scratch = TensorDescriptor.from_tensor(scratch[:256].view(2, 2, 64), [1, 1, 64], padding="nan")
    return inputs, scratch, (of_input, 3, inputs[1], of_scratch, 0.5, None, inputs[0], scratch, True)


@WHERE_IT_WAS_READ
def test_the_c_function_is_given_what_triton_gives_it(encoded: list[Any]) -> None:
    inputs, _, args = make_args()
    kernel = make_kernel(args, [way([1, 64]), way([1, 1, 64], elem_type=8)])
    recording = Recording(inputs, [], [(kernel, (7, 8, 9), args)])
    addresses = [tensor.data_ptr() for tensor in inputs]
    recording.replay(addresses, CPU, 42)
    given, maps = kernel.c_function.args, list(encoded)
    assert recording.launches[0].call is kernel.c_function
    scratch = given[-2]
    described = [
        SimpleNamespace(**vars(args[n]) | {"base": SimpleNamespace(data_ptr=lambda at=at: at)})
        for n, at in ((0, addresses[0]), (3, scratch))
    ]
    plain = (described[0], 3, addresses[1], described[1], 0.5, None, addresses[0], scratch, True)
    encoded.clear()
    kernel.run(7, 8, 9, 42, kernel.function, kernel.packed_metadata, None, None, None, *plain)
    assert given == frozen(kernel.c_function.args)
    assert maps == encoded
    assert given[:3] == (7, 8, 9)
    assert len(given) == 13 + 7 + (1 + 4) + (1 + 6)


@WHERE_IT_WAS_READ
def test_a_kernel_without_descriptors(encoded: list[Any]) -> None:
    inputs = [torch.zeros(5)]
    kernel = make_kernel((inputs[0], 3), [], launch_pdl=False, launch_cooperative_grid=True)
    recording = Recording(inputs, [], [(kernel, (7, 8, 9), (inputs[0], 3))])
    recording.replay([1024], CPU, 42)
    given = kernel.c_function.args
    assert recording.launches[0].call is kernel.c_function
    kernel.run(7, 8, 9, 42, kernel.function, kernel.packed_metadata, None, None, None, 1024, 3)
    assert given == kernel.c_function.args
    assert encoded == []


@WHERE_IT_WAS_READ
def test_a_map_is_encoded_once_per_address(encoded: list[Any]) -> None:
    """Every layer of a model has its own K and V, and meets them again in its next step; kinds of steps share maps."""
    inputs = [torch.zeros(5, 64, dtype=torch.bfloat16)]
    args = (TensorDescriptor.from_tensor(inputs[0], [1, 64]), 1)
    kernel = make_kernel(args, [way([1, 64])])
    first, second = (Recording(inputs, [], [(kernel, (n, 1, 1), args)]) for n in (1, 2))
    for recording in (first, second, first):
        for layer in (1 << 10, 1 << 20, 1 << 30):
            recording.replay([layer], CPU, 1)
            assert kernel.c_function.args[13][0] == layer
    assert [made[0] for made in encoded] == [1 << 10, 1 << 20, 1 << 30]


@WHERE_IT_WAS_READ
def test_each_use_of_a_descriptor_has_its_own_way(encoded: list[Any]) -> None:
    """One descriptor in two launches, and twice in one of them: how it becomes a map is each kernel's matter."""
    inputs = [torch.zeros(5, 64, dtype=torch.bfloat16)]
    one = TensorDescriptor.from_tensor(inputs[0], [1, 64])
    kernels = [make_kernel((one, one), [way([1, 64], swizzle=n), way([1, 64], swizzle=n + 1)]) for n in (0, 2)]
    recording = Recording(inputs, [], [(kernel, (1, 1, 1), (one, one)) for kernel in kernels])
    recording.replay([4096], CPU, 1)
    given = [[kernel.c_function.args[n][1] for n in (13, 18)] for kernel in kernels]
    assert given == [[0, 1], [2, 3]]


@WHERE_IT_WAS_READ
def test_views_share_no_maps_unless_all_is_the_same(encoded: list[Any]) -> None:
    """Another box, element type, shape, stride or padding is another map of the same address."""
    whole = torch.zeros(20, 128, dtype=torch.bfloat16)
    views = [whole[:5, :64], whole[:6, :64], whole.view(40, 64)[:5]]
    seen = set()
    for view in (*views, whole[10:15, :64]):  # the last is the first, elsewhere
        for padding in ("zero", "nan"):
            for how in (way([1, 64]), way([2, 64]), way([1, 64], elem_type=8), way([1, 64], swizzle=2)):
                args = (TensorDescriptor.from_tensor(view, how["block_size"], padding=padding),)
                kernel = make_kernel(args, [how])
                Recording([view], [], [(kernel, (1, 1, 1), args)]).replay([4096], CPU, 1)
                seen.add(kernel.c_function.args[13])
    assert len(encoded) == len(seen) == len(views) * 2 * 4


@WHERE_IT_WAS_READ
@pytest.mark.parametrize(
    ("ways", "changes"),
    [
        ([None], {}),
        ([way([1, 64], fp4_padded=True)], {}),
        ([way([1, 64])], {"global_scratch_size": 8}),
        ([way([1, 64])], {"profile_scratch_size": 8}),
    ],
    ids=["a decomposed descriptor", "padded fp4", "scratch", "a profile"],
)
def test_kernels_outside_the_rule_are_launched_by_triton(
    ways: list[Any], changes: dict[str, Any], encoded: list[Any]
) -> None:
    inputs = [torch.zeros(5, 64, dtype=torch.bfloat16)]
    args = (TensorDescriptor.from_tensor(inputs[0], [1, 64]), 1)
    kernel = make_kernel(args, ways, **changes)
    (launch,) = Recording(inputs, [], [(kernel, (1, 1, 1), args)]).launches
    assert launch.call is kernel.run


@WHERE_IT_WAS_READ
def test_hooks_see_descriptors(encoded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    class Hooked(SimpleNamespace):
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *args, stream: vars(self).update(seen=(grid, stream, args))

    inputs, _, args = make_args()
    kernel = Hooked(**vars(make_kernel(args, [way([1, 64]), way([1, 1, 64])])))
    recording = Recording(inputs, [], [(kernel, (7, 8, 9), args)])
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda _: None)
    recording.replay([16, 32], CPU, 42)
    grid, stream, (of_input, three, at, of_scratch, *_, scratch, _) = kernel.seen
    assert (grid, stream, three, at) == ((7, 8, 9), 42, 3, 32)
    assert (of_input.base.data_ptr(), of_input.block_shape) == (16, [1, 64])
    assert (of_scratch.base.data_ptr(), of_scratch.padding) == (scratch, "nan")
    assert encoded == []


@WHERE_IT_WAS_READ
def test_another_version_is_launched_by_triton(encoded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for version, ruled in (("3.6.0", True), ("3.7.0", False), ("3.60.0", False), ("4.6.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        kernel = make_kernel((1,), [])
        assert (entry_of(kernel.run) is not None) == ruled, version


@WHERE_IT_WAS_READ
@pytest.mark.parametrize("arguments", ["iiiKppOOOOOOKK", None])
def test_another_launcher_of_the_same_version_is_left_to_triton(
    arguments: str | None, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build between two releases bears the number of one and may have the launcher of the other."""
    from triton.backends.nvidia import driver as nvidia

    kernel = make_kernel((1,), [])
    if arguments is None:
        monkeypatch.delattr(nvidia, "_BASE_ARGS_FORMAT")
    else:
        monkeypatch.setattr(nvidia, "_BASE_ARGS_FORMAT", arguments)
    assert entry_of(kernel.run) is None


@WHERE_IT_WAS_READ
def test_a_wrapper_that_was_not_read_is_left_to_triton(encoded: list[Any]) -> None:
    def wrapping(launch: Any) -> Any:
        return lambda *args: launch(*args)

    kernel = make_kernel((1,), [])
    kernel.run.launch = wrapping(kernel.c_function)
    assert entry_of(kernel.run) is None


def test_a_launcher_that_is_not_cuda_s_is_left_alone() -> None:
    assert entry_of(lambda *_: None) is None


def test_maps_do_not_pile_up() -> None:
    made: list[int] = []
    maps = TensorMaps(lambda address: made.append(address) or (address,))
    for address in range(1, 3 * MOST_MAPS):
        assert maps.at(address) == (address,)
        assert maps.at(address) is maps.at(address)
        assert len(maps._known) <= MOST_MAPS
    assert len(made) == 3 * MOST_MAPS - 1
