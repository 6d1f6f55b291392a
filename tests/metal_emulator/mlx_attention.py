"""Counts the work of MLX's attention kernel for Metal by running its source in the emulator, as for
our kernels.

The text comes from the installed MLX package, which contains the header files of MLX's kernels.
"""

import ctypes
import re
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import EXPORTS, execute, rewrite

PACKAGE = next(x for x in Path(mx.__file__).parents if x.name == "mlx")
HEADERS = PACKAGE / "include" / "mlx" / "backend" / "metal" / "kernels"
#: The header files that the kernel needs in addition to Metal's library, in the order in which they
#: are included.
FILES = [
    "steel/attn/params.h",
    "steel/attn/loader.h",
    "steel/attn/transforms.h",
    "steel/attn/mma.h",
]
KERNEL = "steel/attn/kernels/steel_attention.h"
#: Text that replaces MLX's macros, traits and limits, which depend on internals of Apple's
#: compiler.
PRELUDE = """
#define METAL_FUNC inline
#define STEEL_CONST static constexpr
#define STEEL_PRAGMA_UNROLL
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
namespace metal {
using std::conditional_t;
template <typename P>
struct pointer_element { using type = std::remove_cv_t<std::remove_pointer_t<P>>; };
template <typename T, typename Space>
struct pointer_element<emu::ptr<T, Space>> { using type = std::remove_cv_t<T>; };
template <typename P>
using pointer_element_t = typename pointer_element<P>::type;
}
namespace mlx { namespace steel {
template <int v>
using Int = std::integral_constant<int, v>;
} }
template <typename T>
struct Limits { static constexpr T finite_min = -std::numeric_limits<T>::max(); };
"""
#: The constants that the host sets for a plain causal call whose length is a multiple of all tile
#: sizes.
CONSTANTS = {
    "align_Q": True,
    "align_K": True,
    "has_mask": False,
    "do_causal": True,
    "has_sinks": False,
}


class Params(ctypes.Structure):
    """Has the same layout as AttnParams in steel/attn/params.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("B", "H", "D", "qL", "kL", "gqa_factor")),
        ("scale", ctypes.c_float),
        *(
            (name, ctypes.c_int)
            for name in ("NQ", "NK", "NQ_aligned", "NK_aligned", "qL_rem", "kL_rem", "qL_off")
        ),
        *((name, ctypes.c_int64 * 3) for name in ("Q", "K", "V", "O")),
    )


def shape_of_groups(d: int) -> tuple[int, int, int]:
    """Returns the number of keys in a tile, and the number of simdgroups along rows and along D, in
    MLX's instances of the kernel.

    A tile has 32 queries. These are the instances in steel_attention.metal that the host chooses if
    there are no neural accelerators.
    """
    return (16 if d in (128, 192) else 32), 4, 2 if d == 256 else 1


def text_of(kernel: str, save_lse: bool) -> str:
    """Returns the header files and the kernel as one text, without #include and #pragma lines."""
    text = PRELUDE + "".join((HEADERS / file).read_text() for file in FILES)
    text = re.sub(r"^#(include|pragma)[^\n]*$", "", text, flags=re.M)
    body = re.sub(r"^#(include|pragma)[^\n]*$", "", (HEADERS / kernel).read_text(), flags=re.M)
    for name, value in (CONSTANTS | {"save_lse": save_lse}).items():
        body = re.sub(
            rf"constant bool {name} \[\[[^\]]*\]\];",
            f"static constexpr bool {name} = {str(value).lower()};",
            body,
        )
    # Replace addresses of elements with pointer arithmetic, because indexing a pointer of the
    # emulator returns a temporary object, which has no address.
    whole = re.sub(r"&\(\s*(\w+)\[([^\[\]]*)\]\)", r"(\1 + (\2))", text + body)
    whole = re.sub(r"&(\w+)\[([^\[\]]*)\]", r"(\1 + (\2))", whole)
    return rewrite(whole, body_begins=0)


def run(q: mx.array, k: mx.array, v: mx.array, scale: float) -> tuple[mx.array, mx.array, dict]:
    """Returns o, lse and the counts of plain causal attention with MLX's kernel.

    q, k and v are [1,1,T,D], where T is a multiple of 32. If two simdgroups share a row, lse is not
    computed and 0 is returned for it, because both simdgroups would write the same element.
    """
    tokens, d = q.shape[2:]
    bk, wm, wn = shape_of_groups(d)
    stride = (tokens * d, tokens * d, d)
    params = Params(1, 1, d, tokens, tokens, 1, scale, *(tokens // 32, tokens // bk) * 2)
    for name in ("Q", "K", "V", "O"):
        setattr(params, name, (ctypes.c_int64 * 3)(*stride))

    def pointer(type_: str, i: int, space: str = "Device") -> str:
        return f"emu::ptr<{type_}, emu::{space}>(emu::block({i}), 0)"

    none = "emu::ptr<const float, emu::Device>()"
    arguments = [
        *(pointer("const bfloat16_t", i) for i in range(3)),
        pointer("bfloat16_t", 4),
        pointer("const mlx::steel::AttnParams", 3, "Constant"),
        "emu::ptr<const mlx::steel::AttnMaskParams, emu::Constant>()",
        none,
        "emu::ptr<const bfloat16_t, emu::Device>()",
        pointer("float", 5) if wn == 1 else "emu::ptr<float, emu::Device>()",
        "at.thread_index_in_simdgroup",
        "at.simdgroup_index_in_threadgroup",
        "at.threadgroup_position_in_grid",
        "at.thread_position_in_threadgroup",
    ]
    values = f"bfloat16_t, 32, {bk}, {d}, {d}, {wm}, {wn}"
    cxx = (
        f"{text_of(KERNEL, wn == 1)}\nstatic void kernel() {{\n  const auto& at = emu::self().at;\n"
        f"  attention<{values}>({', '.join(arguments)});\n}}\n{EXPORTS}"
    )
    inputs = {"q": q, "k": k, "v": v, "params": mx.array(np.frombuffer(bytes(params), np.uint8))}
    outputs = {"o": (q.shape, mx.bfloat16)}
    if wn == 1:
        outputs["lse"] = (q.shape[:3], mx.float32)
    counts: list[dict[str, int]] = []
    grid = (32 * (tokens // 32), wm, wn)
    o, *rest = execute("mlx", cxx, inputs, outputs, grid, (32, wm, wn), (0,), counts)
    return o, rest[0] if rest else mx.zeros(q.shape[:3]), counts[0]
