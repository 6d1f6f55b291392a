"""Compiles the Metal text of every kernel, as MLX would pass it, with a compiler that supports
address spaces.

In Clang's C++ for OpenCL, as in Metal, types have address spaces. Two more passes compile the text
as plain C++, to check it against the language versions on which Metal is based. `says_of` finds
faults that these compilers accept but Apple's compiler rejects: pointers or references without an
address space, and variables or threadgroup memory outside of a kernel.
"""

import re
import shutil
from collections import defaultdict
from dataclasses import dataclass

import mlx.core as mx

from metal_emulator import SHARED

from . import faults
from .cross import compare
from .instances import Instance, instances
from .machine import BUILD, HERE, SITE, Found, at_once, environment, run, zig

FOLDER = BUILD / "metal"
UTILS = SITE / "mlx" / "include" / "mlx" / "backend" / "metal" / "kernels"
#: The limits of all Apple GPUs: bytes of threadgroup memory, threads per threadgroup, and threads
#: per simdgroup.
MEMORY, MOST_THREADS, SIMD = 32768, 1024, 32
WARNINGS = [
    *("-Werror", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wdouble-promotion"),
    *("-Wno-unused-parameter", "-Wno-unused-function", "-Wno-sign-conversion"),
    *("-Wno-undefined-inline", "-Wno-undefined-internal", "-Wno-unknown-attributes"),
]
OPENCL = [
    *("-x", "cl", "-cl-no-stdinc", "-cl-std=clc++2021", "-Xclang", "-ffake-address-space-map"),
]


@dataclass(frozen=True)
class Mode:
    name: str
    flags: list[str]
    utils: bool  #: whether MLX's text precedes the kernel
    kernels: bool  #: whether kernels with constant arguments are compiled instead of a template


MODES = [
    Mode("address spaces", [*OPENCL, "-DBFLOAT_CLASS"], False, True),
    Mode("after MLX's own text", OPENCL, True, True),
    Mode("C++14, Metal 3.1", ["-x", "c++", "-std=gnu++14"], False, False),
    Mode("C++17, Metal 4.0", ["-x", "c++", "-std=gnu++17"], False, False),
]
PLAIN = (
    "#include <metal_stdlib>\nusing namespace metal;\n"
    "typedef half float16_t;\ntypedef bfloat bfloat16_t;\n"
)
SHAPE = re.compile(
    r"^template <(?P<parameters>[^>]*)>\n\[\[kernel\]\] void (?P<name>\w+)\(\n(?P<takes>.*?)\) \{\n"
    r"(?P<body>.*?)\n\}\n\ntemplate .*decltype\(\w+<(?P<values>[^>]*)>\)",
    re.S | re.M,
)


def own_words() -> str:
    """Returns declarations of the built-in functions of Apple's compiler that MLX's code uses."""
    text = (UTILS / "bf16_math.h").read_text()
    names = sorted(set(re.findall(r"__metal_\w+", text)))
    first = "template <typename T, typename... A> T first_of(T, A...);\n"
    return first + "".join(
        f"template <typename... A> auto {x}(A... a) -> decltype(first_of(a...));\n" for x in names
    )


def split(instance: Instance) -> tuple[str, re.Match[str]]:
    """Returns the header of a kernel's text, and a regex match with the parts of the kernel."""
    text = instance.text()
    match = SHAPE.search(text)
    if match is None:
        raise Found(f"{instance}: its text does not have the form that MLX generates")
    return text[: match.start()], match


def limits(body: str, arguments: dict) -> str:
    """Returns static assertions about a kernel's threadgroup memory and number of threads."""
    sizes = [f"sizeof({type_}) * ({n})" for type_, _, n in SHARED.findall(body)]
    asserts = [
        f'static_assert({x} % 16 == 0, "the next array is out of alignment");' for x in sizes
    ]
    total = " + ".join(sizes) or "0"
    asserts.append(f'static_assert({total} <= {MEMORY}, "too much threadgroup memory");')
    threads = arguments["THREADS"]
    asserts.append(
        f"static_assert({threads} % {SIMD} == 0 && {threads} <= {MOST_THREADS},"
        ' "invalid number of threads per threadgroup");'
    )
    return "\n".join(asserts) + "\n"


def as_kernel(match: re.Match[str], arguments: dict) -> str:
    takes = re.sub(
        r"const constant (\w+)& (\w+) \[\[", r"const constant \1* \2_at [[", match["takes"]
    )
    references = re.findall(r"const constant (\w+)& (\w+) \[\[", match["takes"])
    takes = re.sub(r"\s*\[\[\w+(\(\d+\))?\]\]", "", takes)
    constants = ""
    for parameter, value in zip(
        match["parameters"].split(", "), match["values"].split(", "), strict=True
    ):
        kind, name = parameter.split()
        constants += (
            f"typedef {value} {name};\n"
            if kind == "typename"
            else f"constant constexpr {kind} {name} = {value};\n"
        )
    named = "".join(f"const constant {type_}& {x} = *{x}_at;\n" for type_, x in references)
    return (
        f"{constants}{limits(match['body'], arguments)}kernel void {match['name']}(\n{takes}) {{\n"
        f'{named}#line 1 "{match["name"]}"\n{match["body"]}\n}}\n'
    )


def as_template(match: re.Match[str]) -> str:
    takes = re.sub(r"\s*\[\[\w+(\(\d+\))?\]\]", "", match["takes"])
    body = SHARED.sub(r"threadgroup \1* \2 = handed_out<\1, (\3)>();", match["body"])
    name, values = match["name"], match["values"]
    return (
        f"template <typename T, int N> threadgroup T* handed_out();\n"
        f"template <{match['parameters']}>\nvoid {name}(\n{takes}) {{\n"
        f'#line 1 "{name}"\n{body}\n}}\ntemplate decltype({name}<{values}>) {name}<{values}>;\n'
    )


SPACES = re.compile(r"\b(device|constant|threadgroup|thread)\b")
GLOBAL = re.compile(
    r"^(?!using|typedef|template|struct|return|namespace)(?:\w[\w<>, ]*)\s\w+(?:\s*=[^;{}]*)?;",
    re.M,
)
TYPES = {"T", "float", "int", "uint", "half", "bool", "Matrix", "Shape", "Place", "Seen", "Gate"}


def says_of(header: str) -> str:
    """Returns an error message if the text has a fault that only Apple's compiler rejects, and
    otherwise an empty string."""
    text = re.sub(r"//[^\n]*", "", header)
    for match in re.finditer(r"(\w+(?:<[^<>;{}()]*>)?)\s*([*&])\s*(\w+)(?=\s*[,)])", text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.end()]
        before = re.split(r"[(,;{]", line)[-1]
        declares = match[1] in TYPES and re.fullmatch(r"\s*(const\s+)?[\w<>, ]+[*&]\s*\w+", before)
        if declares and not SPACES.search(before):
            return f"error: {before.strip()!r} names no address space"
    for match in GLOBAL.finditer(text):
        if "constant" not in match[0].split("=")[0].split():
            return f"error: {match[0]!r} is a variable outside of constant memory"
    match = SHARED.search(text)
    return f"error: {match[0]!r} is declared outside of a kernel" if match else ""


def compile_text(label: str, mode: Mode, header: str, kernels: list[str]) -> str:
    """Returns the compiler's errors, or an empty string if there are none."""
    start = '#include "mlx/backend/metal/kernels/utils.h"\n' if mode.utils else ""
    start = PLAIN.split("\n")[0] + "\n" + own_words() + start if mode.utils else PLAIN
    text = f'{start}#line 1 "header"\n{header}\n'
    for i, kernel in enumerate(kernels):
        text += f"namespace instance_{i} {{\n{kernel}}}\n"
    file = FOLDER / f"{label}.{mode.name.replace(' ', '_').replace('/', '_')}.cl"
    file.write_text(text)
    warnings = WARNINGS if mode.kernels else [*WARNINGS, "-Wno-c++17-extensions"]
    command = zig(
        *("clang", "--target=x86_64-linux-gnu", "-fsyntax-only", "-nostdinc", "-ferror-limit=0"),
        *(f"-I{HERE / 'metal'}", "-isystem", SITE / "mlx" / "include"),
        *warnings,
        *mode.flags,
        file,
    )
    done = run(command, env=environment())
    said = done.stderr
    # C++ for OpenCL does not accept all of MLX's code, so only errors in our code are reported.
    errors = re.findall(r"^(?!\S*/mlx/backend/)\S+: (?:fatal )?error: .*(?:\n.*){0,2}", said, re.M)
    return "\n".join(errors) or (said if done.returncode and not mode.utils else "")


def check() -> int:
    """Compiles each kernel in each mode, and raises an error if one does not compile. Returns the
    number of compilations."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    groups: dict[tuple[str, str, bool], list[Instance]] = defaultdict(list)
    for instance in instances():
        dtype = str(instance.arguments["T"])
        groups[instance.kernel, dtype, instance.small].append(instance)

    def says(job: tuple[list[Instance], Mode]) -> str:
        group, mode = job
        parts = [split(x) for x in group]
        first = group[0]
        label = f"{first.kernel}_{str(first.arguments['T']).split('.')[-1]}_{int(first.small)}"
        kernels = [
            as_kernel(match, x.arguments) if mode.kernels else as_template(match)
            for (_, match), x in zip(parts, group, strict=True)
        ]
        header = parts[0][0]
        said = says_of(header) or compile_text(label, mode, header, kernels)
        return said and f"{first} and similar kernels, {mode.name}:\n{said}"

    jobs = [(group, mode) for group in groups.values() for mode in MODES]
    wrong = [text for text in at_once(says, jobs) if text]
    if wrong:
        raise Found("a Metal compiler would reject the text\n" + "\n".join(wrong)[:6000])
    return sum(map(len, groups.values())) * len(MODES)


def check_faults() -> int:
    """Checks that each fault in a kernel causes an error that names the fault. Returns the number
    of faults."""
    by_name = {
        "attention": Instance(
            "attention",
            {"T": mx.bfloat16, "D": 128, "CAP": True, "ROWS": 32, "THREADS": 128},
            False,
        ),
        "glu": Instance("glu", {"T": mx.bfloat16, "GELU": True, "PER": 4, "THREADS": 256}, True),
        "softmax_rows": Instance(
            "softmax_rows",
            {"S": mx.float32, "T": mx.float16, "CAP": True, "THREADS": 256},
            True,
        ),
    }

    def says(fault: faults.Text) -> str:
        instance = by_name[fault.file]
        header, match = split(instance)
        whole = header + match[0]
        if fault.old not in whole:
            raise Found(f"{fault.what}: {fault.file} does not contain {fault.old!r}")
        broken = whole.replace(fault.old, fault.new, 1)
        match = SHAPE.search(broken)
        assert match is not None
        header = broken[: match.start()]
        said = says_of(header)
        for mode in MODES:
            kernel = as_kernel(match, instance.arguments) if mode.kernels else as_template(match)
            said += compile_text(f"fault_{faults.METAL.index(fault)}", mode, header, [kernel])
        return said

    return compare(faults.METAL, at_once(says, faults.METAL))
