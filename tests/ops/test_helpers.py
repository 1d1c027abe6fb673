"""The part of a header that a kernel's body needs."""

import mlx.core as mx
import pytest

from mlx_kvq import ops
from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import Spec
from mlx_kvq.ops.gpu import helpers, jit
from mlx_kvq.ops.gpu.plan import plan
from tests.emulator import emulated

HEADER = """#define INLINE inline __attribute__((always_inline))
namespace kvq {
enum : int { A = 0, B = 1 };
constexpr int seven = twice(4) - 1;
constexpr int twice(int n) {
return 2 * n;
}
template <int N = twice(3), typename T = box<2>>
INLINE int used(const device T* x, int i) {
if (i > 0) { return inner<N>(x[i]); }
return 0;
}
template <int N>
INLINE int inner(float y) {
return N;
}
template <int N>
INLINE int inner(int y) {
return N;
}
template <int N>
struct box {
int x[N];
};
struct lonely {
int x;
};
INLINE void unused(lonely y) {
never(y);
}
template <typename T>
INLINE void never(T) {}
}
"""


def names(text):
    return [n for n in map(helpers._name, helpers._parts(text)) if n]


def test_what_a_body_needs():
    """Functions and structures that are named, all overloads, and what those name in turn."""
    text = helpers.needed(HEADER, "int main() { return kvq::used<3>(x, 2); }")
    assert names(text) == ["twice", "used", "inner", "inner", "box"]
    for kept in ("#define INLINE", "namespace kvq {", "enum : int", "constexpr int seven", "\n}\n"):
        assert kept in text
    assert "unused" not in text and "lonely" not in text and "never" not in text
    assert text.count("{") == text.count("}")


def test_what_nothing_names_is_left_out_but_variables_keep_what_they_call():
    assert names(helpers.needed(HEADER, "")) == ["twice"]
    assert names(helpers.needed(HEADER, "unused")) == ["twice", "lonely", "unused", "never"]


@pytest.mark.parametrize("name", jit.KERNELS)
def test_pieces_of_the_kernels_are_the_whole(name):
    text = "".join(jit._source(h) for h in ("machine", *jit.KERNELS[name][0]))
    parts = list(helpers._parts(text))
    assert "".join(parts) == text
    assert len([p for p in parts if helpers._name(p)]) > 10
    declared = [p for p in parts if helpers._name(p)]
    assert all(p.count("{") == p.count("}") for p in declared)
    # store_with_feedback is declared before the header that defines it.
    assert all("{" in p or "store_with_feedback" in p for p in declared)


def test_kernels_are_given_only_what_they_need():
    """Which is enough: they compile and run."""
    fmt = make_format(Spec.parse("int4-srft"), 64)
    k = mx.random.normal((1, 2, 5, 64))
    with emulated("fast") as e:
        rows, _ = ops.quantize_pack(k, k, fmt)
        mx.eval(rows, ops.dequantize(ops.Packed(rows, 5, fmt)))
        assert {c.kernel.split("_")[3] for c in e.counters} == {"quantize", "dequantize"}
    made = plan(fmt.kind)
    packs = (*made.pack, ("PAIRS", 1), ("KEEPS", False), ("TAIL", False), ("ROTATED", 0))
    unpacks = (*made.dequantize, ("TAIL", False), ("FIRST", False), ("PLACES", False))
    whole = "".join(map(jit._source, ("machine", "vectors", "levels")))
    for name, constants, other in (
        ("quantize_pack", packs, "finish_row"),
        ("dequantize", unpacks, "multiply_tile"),
    ):
        text = jit.text("metal", name, constants)
        assert other in whole and other not in text.header + text.body
    ops.forget()
