"""Runs the source of a Metal kernel on the CPU, and checks its memory accesses. See
docs/metal_on_linux.md.

`kernel_text` generates the same text as `mx.fast.metal_kernel`, and `rewrite` converts the text to
C++ for emulator.h. `emulate` builds this C++ code, runs it with several thread orders, and compares
the results.
"""

import ctypes
import functools
import hashlib
import math
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
#: Orders of simdgroups and lanes: ascending, descending, and random.
ORDERS = (0, 1, 7)
CXX = shlex.split(os.environ.get("METAL_EMULATOR_CXX", "g++"))
#: Flags for every compiler. Unlike Metal, Clang computes `1.0 * x` in double precision, so kernels
#: use `1.0f`.
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-ffp-contract=off"),
    *("-Wdouble-promotion", "-Wno-unknown-pragmas", "-Wno-deprecated-declarations"),
]
GCC_FLAGS = ["-fsingle-precision-constant", "-Wno-literal-suffix"]
CLANG_FLAGS = ["-Wno-user-defined-literals"]
TYPES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}
#: The thread attributes that a kernel body may use, as in MLX.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

Template = Mapping[str, mx.Dtype | int | bool]
Outputs = Mapping[str, tuple[Sequence[int], mx.Dtype]]


class MetalError(Exception):
    """Raised if a kernel does something that Metal forbids or leaves undefined."""


def template_value(x: mx.Dtype | int | bool) -> str:
    return TYPES[x] if isinstance(x, mx.Dtype) else str(int(x))


def kernel_text(
    name: str,
    source: str,
    header: str,
    inputs: Mapping[str, mx.array],
    outputs: Outputs,
    template: Template,
) -> tuple[str, str, list[str]]:
    """Returns the kernel's text and name, as MLX generates them, and a C++ expression for each
    argument."""
    if not (header + source).isascii():
        raise MetalError(
            f"{name}: MLX passes the text to Metal as ASCII, but it contains other characters"
        )
    values = ", ".join(map(template_value, template.values()))
    full = f"custom_kernel_{name}"
    if template:
        full += "_" + ("_" + values.replace(", ", "_"))
    parameters, arguments = [], []

    def add(type_, parameter, argument):
        parameters.append(f"  {type_} {parameter} [[buffer({len(parameters)})]]")
        arguments.append(argument)

    for i, (key, x) in enumerate(inputs.items()):
        space = "constant" if x.size < 8 else "device"
        full += f"_{TYPES[x.dtype]}" + ("s" if x.ndim == 0 else "c" * (x.size < 8))
        star = "*" if x.ndim else "&"
        pointer = f"emu::ptr<const {TYPES[x.dtype]}, emu::{space.title()}>(emu::block({i}), 0)"
        add(f"const {space} {TYPES[x.dtype]}{star}", key, pointer if x.ndim else f"*{pointer}")
        if x.ndim and f"{key}_shape" in source:
            add("const constant int*", f"{key}_shape", numbers("int", x.shape))
        if x.ndim and f"{key}_strides" in source:
            strides = [math.prod(x.shape[j + 1 :]) for j in range(x.ndim)]
            add("const constant int64_t*", f"{key}_strides", numbers("int64_t", strides))
        if x.ndim and f"{key}_ndim" in source:
            add("const constant int&", f"{key}_ndim", str(x.ndim))
    for i, (key, (_, dtype)) in enumerate(outputs.items(), len(inputs)):
        full += f"_{TYPES[dtype]}"
        pointer = f"emu::ptr<{TYPES[dtype]}, emu::Device>(emu::block({i}), 0)"
        add(f"device {TYPES[dtype]}*", key, pointer)
    for key, type_ in ATTRIBUTES.items():
        if key in source:
            parameters.append(f"  {type_} {key} [[{key}]]")
            arguments.append(f"emu::self().at.{key}")
    text = header
    if template:
        kinds = {mx.Dtype: "typename", bool: "bool", int: "int"}
        text += f"template <{', '.join(f'{kinds[type(v)]} {k}' for k, v in template.items())}>\n"
    text += f"[[kernel]] void {full}(\n" + ",\n".join(parameters) + f") {{\n{source}\n}}\n"
    if template:
        text += f'\ntemplate [[host_name("{full}")]] [[kernel]] decltype({full}<{values}>)'
        text += f" {full}<{values}>;\n"
        full += f"<{values}>"
    return text, full, arguments


def numbers(type_: str, values: Sequence[int]) -> str:
    """Returns an expression for a pointer to constants whose values are known at launch."""
    return f"emu::numbers<{type_}, {', '.join(map(str, values))}>()"


TYPE = r"(?:metal::)?\w+(?:<[^<>;(){}]*(?:<[^<>;(){}]*>[^<>;(){}]*)*>)?"
SPACED = re.compile(
    rf"(const\s+)?\b(device|threadgroup|constant)\s+(const\s+)?({TYPE})\s*(const\s*)?([*&])"
)
SHARED = re.compile(rf"\bthreadgroup\s+({TYPE})\s+(\w+)\s*\[([^\]]*)\]\s*;")


def rewrite(text: str, body_begins: int) -> str:
    """Replaces address spaces with types, without changing line numbers."""

    def blank(match):
        return re.sub(r"[^\n]", " ", match[0])

    def spaced(match):
        before, space, after, type_, behind, mark = match.groups()
        const = "const " if before or after or behind or space == "constant" else ""
        if mark == "&":
            if space != "constant":
                raise MetalError(f"a reference to {space} memory is not emulated: {match[0]!r}")
            return f"const {type_}&"
        return f"emu::ptr<{const}{type_}, emu::{space.title()}>"

    text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
    if re.search(r"\bdouble\b", text):
        raise MetalError("Metal has no double")
    text = re.sub(r"\[\[[^\[\]]*\]\]", "", text)
    for match in SHARED.finditer(text):
        if match.start() < body_begins:
            raise MetalError(f"threadgroup memory is declared outside the kernel: {match[0]!r}")
    text = SHARED.sub(r'auto \2 = emu::shared<\1, (\3)>("\2");', text)
    text = SPACED.sub(spaced, text)
    return re.sub(r"reinterpret_cast<(?=\s*emu::ptr)", "static_cast<", text)


@functools.cache
def compiler() -> tuple[list[str], str]:
    """Returns the command of the compiler with its flags, and the version of the compiler."""
    version = subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=True).stdout
    more = CLANG_FLAGS if "clang" in version else GCC_FLAGS
    return [*CXX, *FLAGS, *more], version


@functools.cache
def build_folder() -> Path:
    """Returns a folder with the files that every kernel needs: the precompiled header and the
    compiled machine.cpp. Each combination of emulator version, compiler and flags has a separate
    folder.
    """
    files = {name: (HERE / name).read_text() for name in ("emulator.h", "machine.cpp")}
    key = hashlib.sha256(repr((files, compiler())).encode()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"metal_emulator_{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise MetalError(f"{root} belongs to another user; set TMPDIR")
    folder = root / key
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        if not (folder / name).exists():  # another process may be building here
            aside = folder / f"{name}.{os.getpid()}"
            aside.write_text(text)
            aside.rename(folder / name)
    if not (folder / "machine.o").exists():
        compile_cxx(folder / "machine.cpp", folder / "machine.o", "-c")
    built_ahead = folder / "emulator.h.gch"
    if not built_ahead.exists():
        compile_cxx(folder / "emulator.h", built_ahead, "-x", "c++-header")
    return folder


def compile_cxx(source: Path, target: Path, *flags: str) -> None:
    aside = target.with_suffix(f".{os.getpid()}")
    run = subprocess.run(
        [*compiler()[0], *flags, str(source), "-o", str(aside)], capture_output=True, text=True
    )
    if run.returncode or re.search(r"to .double.*\[-Wdouble-promotion\]", run.stderr):
        raise MetalError("the kernel does not compile\n" + run.stderr[:4000])
    aside.rename(target)


class Counts(ctypes.Structure):
    """The work of a launch, with the layout of `Counts` in emulator.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "products",
            "device_read",
            "device_written",
            "threadgroup_read",
            "threadgroup_written",
            "device_accesses",
            "threadgroup_reads",
            "threadgroup_writes",
            "barriers",
            "functions",
            "conversions",
        )
    )


@functools.cache
def build(cxx: str):
    folder = build_folder()
    key = hashlib.sha256(cxx.encode()).hexdigest()[:24]
    library = folder / f"{key}.so"
    if not library.exists():
        source = folder / f"{key}.{os.getpid()}.cpp"
        source.write_text(cxx)
        ahead = ["-include", str(folder / "emulator.h"), str(folder / "machine.o")]
        compile_cxx(source, library, "-shared", *ahead)
    loaded = ctypes.CDLL(str(library))
    loaded.launch.restype = ctypes.c_char_p
    loaded.counted.restype = ctypes.POINTER(Counts)
    return loaded


class Argument(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("element", ctypes.c_size_t),
        ("output", ctypes.c_int),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int * 3),
        ("threadgroup", ctypes.c_int * 3),
        ("order", ctypes.c_int),
    )


def to_bytes(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).reshape(-1).view(mx.uint8), copy=True)


#: The functions that a built kernel exports, as text that follows `static void kernel()`.
EXPORTS = (
    'extern "C" const char* launch(const emu::Argument* args, int n, const emu::Launch* at)'
    " { return emu::launch(kernel, args, n, *at); }\n"
    'extern "C" const emu::Counts* counted() { return &emu::machine.counts; }\n'
)


def to_cxx(
    name: str,
    source: str,
    header: str,
    inputs: Mapping[str, mx.array],
    outputs: Outputs,
    template: Template,
) -> str:
    """Returns the C++ code of a kernel that exports `launch`, to be compiled after emulator.h."""
    text, full, arguments = kernel_text(name, source, header, inputs, outputs, template)
    body = rewrite(text, body_begins=len(header))
    return (
        f'#line 1 "{name}"\n{body}\n'
        f"static void kernel() {{ {full}({', '.join(arguments)}); }}\n{EXPORTS}"
    )


def emulate(
    name: str,
    source: str,
    header: str,
    inputs: Mapping[str, mx.array | np.ndarray],
    outputs: Outputs,
    template: Template,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    orders: Sequence[int] = ORDERS,
    counts: list[dict[str, int]] | None = None,
) -> list[mx.array]:
    """Returns the arrays that `mx.fast.metal_kernel(...)(...)` would return. `outputs` maps the
    name of each output to its shape and dtype.

    Appends the work of the launch to `counts`. Returns mx arrays, because NumPy has no bfloat16.
    Raises MetalError.
    """
    arrays = {k: x if isinstance(x, mx.array) else mx.array(x) for k, x in inputs.items()}
    cxx = to_cxx(name, source, header, arrays, outputs, template)
    return execute(name, cxx, arrays, outputs, grid, threadgroup, orders, counts)


def execute(
    name: str,
    cxx: str,
    arrays: Mapping[str, mx.array],
    outputs: Outputs,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    orders: Sequence[int],
    counts: list[dict[str, int]] | None,
) -> list[mx.array]:
    """Builds and runs C++ code from `to_cxx`. The kernel's arguments are `arrays`, followed by
    `outputs`."""
    library = build(cxx)
    group = [min(t, g) for t, g in zip(threadgroup, grid, strict=True)]
    if math.prod(group) > 1024:
        raise MetalError(f"{name}: a threadgroup has {math.prod(group)} threads; the limit is 1024")
    data = {k: (to_bytes(x), x.itemsize, 0) for k, x in arrays.items()}
    for key, (shape, dtype) in outputs.items():
        data[key] = np.empty(math.prod(shape) * dtype.size, np.uint8), dtype.size, 1
    table = (Argument * len(data))(
        *[(k.encode(), x.ctypes.data, x.size, e, o) for k, (x, e, o) in data.items()]
    )
    results = None
    for order in orders:
        for key in outputs:
            data[key][0].fill(0xFF)  # NaN in every floating type
        launch = Launch((ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*group), order)
        error = library.launch(table, len(table), ctypes.byref(launch))
        if error:
            raise MetalError(f"{name}: {error.decode()}")
        now = [data[key][0].tobytes() for key in outputs]
        if results is not None and now != results:
            raise MetalError(f"{name}: the result depends on the order of threads")
        results = now
    assert results is not None
    if counts is not None:
        found = library.counted().contents
        counts.append({field: getattr(found, field) for field, _ in Counts._fields_})
    return [
        mx.array(np.frombuffer(raw, np.uint8)).view(dtype).reshape(*shape)
        for raw, (shape, dtype) in zip(results, outputs.values(), strict=True)
    ]
