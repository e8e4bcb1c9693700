"""Programs whose products, memory and collectives are known, counted from their compiled text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.core import hlo, hlo_groups
from mmjax.core.hlo import Hints, Kernel
from mmjax.core.hlo_text import read_shape


def counted(f, *shapes, **options) -> hlo.Count:
    args = [s if hasattr(s, "dtype") else jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.count(hlo.parse(jax.jit(f).lower(*args).compile().as_text()), **options)


def nested(x, w):
    """3 × 5 products of [32, 16] with [16, 16], and one of [32, 16] with [16, 8]."""

    def inner(_, x):
        return jnp.tanh(x @ w[0])

    def outer(x, _):
        return jax.lax.fori_loop(0, 5, inner, x), None

    return jax.lax.scan(outer, x, None, length=3)[0] @ w[1, :, :8]


def test_products_in_loops_count_by_their_turns():
    found = counted(nested, (32, 16), (2, 16, 16))
    assert found.flops == 2 * 32 * 16 * (15 * 16 + 8)
    assert not found.unknown


def test_a_loop_of_unknown_length_is_named_or_counted_as_told():
    def f(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    found = counted(f, (8, 8), n)
    assert found.flops == 2 * 8**3
    assert [u.what for u in found.unknown] == ["a loop whose bounds are data, counted once"]
    told = counted(f, (8, 8), n, hints=Hints(turns=lambda op: 2.5))
    assert told.flops == 2.5 * 2 * 8**3
    assert not told.unknown


def test_batched_products_and_convolutions():
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 8, 16), (4, 16, 32)).flops == 2 * 4 * 8 * 16 * 32
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID")
    # 6 × 6 places, 3 × 3 of the kernel, 5 channels in, 7 out.
    assert counted(conv, (2, 5, 8, 8), (7, 5, 3, 3)).flops == 2 * 2 * 36 * 9 * 5 * 7
    # At the edge a kernel has fewer values: 2 + 6 · 3 + 2 = 22 pairs along each axis.
    assert counted(functools.partial(conv, padding="SAME"), (2, 5, 8, 8), (7, 5, 3, 3)).flops == 2 * 2 * 22**2 * 5 * 7


def test_a_tpus_batched_product_has_holes_that_are_not_counted():
    """As the TPU compiler writes a batch of 4: a convolution over the batch, 4 places with a stride over zeros."""
    text = """HloModule m, num_partitions=1

ENTRY %main (a: bf16[4,8,16], b: bf16[4,16,32]) -> bf16[4,8,32] {
  %a = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,16,32]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[4,8,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    found = hlo.count(hlo.parse(text))
    assert found.flops == 2 * 4 * 8 * 16 * 32
    assert found.bytes == 2 * (4 * 8 * 16 + 4 * 8 * 32)  # b lies on the chip


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def test_collectives_in_a_loop_count_by_its_turns(mesh):
    """Five sums of f32[16, 8] over the four devices of an axis: each sends 2 · 3/4 of it."""

    def f(x):
        def body(x, _):
            return jax.lax.pvary(jax.lax.psum(x, "b"), "b") if hasattr(jax.lax, "pvary") else jax.lax.psum(x, "b"), None

        return jax.lax.scan(body, x, None, length=5)[0]

    local = jax.shard_map(f, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    found = counted(local, x)
    assert found.collectives() == {"all-reduce": {"count": 5, "bytes": 5 * 2 * 3 / 4 * 16 * 8 * 4}}
    groups = {w.collective.devices for w, _ in found.every() if w.collective}
    assert groups == {(0, 1, 2, 3)}


def test_what_is_gathered_is_counted_as_it_comes_out(mesh):
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("b"))
    f = jax.jit(lambda x: x * 2, out_shardings=whole)
    found = counted(f, jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=split))
    assert found.collectives() == {"all-gather": {"count": 1, "bytes": 3 / 4 * 64 * 8 * 4}}


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{1,3},{0,2}}, x", (1, 3)),
        ("replica_groups=[4,2]<=[8], x", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'b'}, x", (7, 6, 5, 4)),
        ("replica_groups={}, x", tuple(range(8))),
        ("channel_id=1", tuple(range(8))),
    ],
)
def test_groups_of_devices_in_every_spelling(text, group):
    assert hlo_groups.first(text, 8) == group


def test_memory_counts_slices_and_what_is_written_in_place():
    """A scan over rows reads and writes each row once, whatever the whole is."""

    def f(x):
        return jax.lax.scan(lambda c, row: (c, jnp.sin(row)), 0.0, x)[1]

    small, large = (counted(f, (n, 128)).bytes for n in (64, 128))
    assert large < 2.2 * small


def test_a_kernels_own_cost_or_one_that_is_told():
    line = (
        '%k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config": {"cost_estimate":{"flops":"300","bytes_accessed":"40"}}}'
    )
    text = "HloModule m\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  ROOT {}\n}}\n"
    stated = hlo.count(hlo.parse(text.format(line)))
    assert (stated.flops, stated.bytes, stated.unknown) == (300, 40, [])
    silent = text.format(line[: line.index(", backend_config")])
    assert [u.name for u in hlo.count(hlo.parse(silent)).unknown] == ["k"]
    told = Hints(kernel=lambda op, stated, moved: Kernel(stated.flops / 2, moved))
    half = hlo.count(hlo.parse(text.format(line)), told)
    assert (half.flops, half.bytes, half.unknown) == (150, 2 * 8 * 4, [])


def program(entry: str, *others: str) -> hlo.Count:
    """A program of 2 devices, of the lines of its entry and of other computations."""
    text = "\n\n".join(["HloModule m, num_partitions=2", *others, f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}"])
    return hlo.count(hlo.parse(text + "\n"))


def test_what_a_collective_beside_fusions_works_on_is_not_their_memory():
    """As the TPU compiler writes it: the gather's operand and result go through the fusion that it runs beside."""
    gather = """%{name} (p: bf16[8,4], q: bf16[16,4]) -> bf16[16,4] {{
  %p = bf16[8,4]{{1,0}} parameter(0)
  %q = bf16[16,4]{{1,0}} parameter(1)
  ROOT %g = bf16[16,4]{{1,0}} all-gather(%p), replica_groups={{}}, dimensions={{0}}
}}"""
    beside = """%async_collective_fusion.1 (p: bf16[8,4], q: bf16[16,4], x: f32[32]) -> \
(f32[32], bf16[8,4], bf16[16,4]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = bf16[16,4]{1,0} parameter(1)
  %x = f32[32]{0} parameter(2)
  %y = f32[32]{0} negate(%x)
  %g = bf16[16,4]{1,0} all-gather(%p), replica_groups={}, dimensions={0}
  ROOT %t = (f32[32]{0}, bf16[8,4]{1,0}, bf16[16,4]{1,0}) tuple(%y, %p, %g)
}"""
    entry = """  %a = bf16[8,4]{1,0} parameter(0)
  %x = f32[32]{0} parameter(1)
  %async-collective-start = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) fusion(%a), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%f.start
  %s0 = bf16[8,4]{1,0} get-tuple-element(%async-collective-start), index=0
  %s1 = bf16[16,4]{1,0} get-tuple-element(%async-collective-start), index=1
  %fusion.1 = (f32[32]{0}, bf16[8,4]{1,0}, bf16[16,4]{1,0}) fusion(%s0, %s1, %x), kind=kLoop, \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion.1
  %t0 = bf16[8,4]{1,0} get-tuple-element(%fusion.1), index=1
  %t1 = bf16[16,4]{1,0} get-tuple-element(%fusion.1), index=2
  ROOT %async-collective-done = bf16[16,4]{1,0} fusion(%t0, %t1), kind=kCustom, \
output_to_operand_aliasing={{}: (1, {})}, calls=%f.done"""
    found = program(entry, gather.format(name="f.start"), gather.format(name="f.done"), beside)
    assert found.collectives() == {"all-gather": {"count": 1, "bytes": 1 / 2 * 16 * 4 * 2}}
    assert [w.collective.overlaps for w, _ in found.every() if w.collective] == [True]
    assert found.bytes == 2 * 32 * 4


@pytest.mark.parametrize("waits", [True, False])
def test_a_collective_that_a_gpu_waits_for_overlaps_nothing(waits):
    said = "true" if waits else "false"
    found = program(f"""  %a = f32[8]{{0}} parameter(0)
  %s = (f32[8]{{0}}, f32[16]{{0}}) all-gather-start(%a), replica_groups={{}}, dimensions={{0}}, \
backend_config={{"collective_backend_config":{{"is_sync":{said}}}}}
  ROOT %d = f32[16]{{0}} all-gather-done(%s)""")
    assert [w.collective.overlaps for w in found.work] == [not waits]


def test_what_starts_and_ends_counts_once():
    """A slice fetched (512 bytes, read and written), one put back, a fused product, a library's kernel."""
    fused = """%f (p: f32[4,8], q: f32[8,2]) -> f32[4,2] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,2]{1,0} parameter(1)
  ROOT %d = f32[4,2]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""
    found = program(
        """  %a = f32[64,128]{1,0} parameter(0)
  %p = f32[4,8]{1,0} parameter(1)
  %q = f32[8,2]{1,0} parameter(2)
  %i = s32[] constant(3)
  %s = ((f32[64,128]{1,0}, s32[], s32[]), f32[1,128]{1,0:S(1)}, u32[]) dynamic-slice-start(%a, %i, %i)
  %d = f32[1,128]{1,0:S(1)} dynamic-slice-done(%s)
  %u = ((f32[64,128]{1,0}, f32[1,128]{1,0:S(1)}), f32[64,128]{1,0}, u32[]) dynamic-update-slice-start(%a, %d, %i, %i)
  %v = f32[64,128]{1,0} dynamic-update-slice-done(%u)
  %f0 = ((f32[4,8]{1,0}, f32[8,2]{1,0}), f32[4,2]{1,0}, u32[]) fusion-start(%p, %q), kind=kLoop, calls=%f
  %f1 = f32[4,2]{1,0} fusion-done(%f0)
  ROOT %c = f32[4,2]{1,0} custom-call(%f1), custom_call_target="__cudnn$fmhaSoftmax"
""",
        fused,
    )
    assert {w.name: w.bytes for w in found.work} == {"s": 512, "u": 512, "f0": 4 * (32 + 16 + 8), "c": 2 * 4 * 8}
    assert found.flops == 2 * 4 * 2 * 8
    assert [u.name for u in found.unknown] == ["c"]


@pytest.mark.parametrize("step", ["%q", "%two"])
def test_a_loop_that_counts_down(step):
    """From 10 to 0 by 2, which is fused or handed to the fusion."""
    entry = """  %a = s32[] constant(10)
  %x = f32[8]{0} parameter(0)
  %t = (s32[], f32[8]{0}) tuple(%a, %x)
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body"""
    cond = """%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %zero = s32[] constant(0)
  ROOT %c = pred[] compare(%i, %zero), direction=GT
}"""
    body = """%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %less = s32[] fusion(%i, %two), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[8]{0}) tuple(%less, %x)
}"""
    fused = f"""%fused (p: s32[], q: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  %two = s32[] constant(2)
  ROOT %d = s32[] subtract(%p, {step})
}}"""
    found = program(entry, cond, body, fused)
    assert [w.turns for w in found.work] == [5]
    assert not found.unknown


def test_shapes_as_they_are_written():
    shape = read_shape("(bf16[1,4096]{1,0:T(8,128)(2,1)S(1)}, (f32[], pred[3]{0}), /*index=2*/s4[10]{0})")
    assert [p.bytes for p in shape.parts] == [8192, 7, 5]
    assert shape.memory == 12
