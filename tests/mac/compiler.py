"""CMake runs this module instead of the c++ command of a Mac. The module runs zig's compiler, and
replaces libraries that only a Mac has with stand-ins.

The stand-in for a library is a list of symbols. For the C++ library, it contains the symbols that
MLX's wheels for the same macOS version need, and a few older symbols.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from .machine import BUILD, HERE, MACOS, SITE, environment, zig
from .macho import definitions, symbols

TARGET = f"aarch64-macos.{MACOS}"
#: If this macro is 1, functions that are newer than the target macOS have availability attributes.
#: Apple's headers set it to 1, but zig's do not.
AVAILABILITY = "_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS"
COMPILE = [f"-I{HERE / 'include'}", f"-U{AVAILABILITY}", f"-D{AVAILABILITY}=1"]
LIBCXX = "/usr/lib/libc++.1.dylib"
#: Symbols of the C++ library that MLX's wheels do not need. They are part of the standards C++98 to
#: C++14.
OLD_LIBCXX = re.compile(
    r"__ZN?K?St(11logic_error|3__1(17__assoc_sub_state|6futureIvE|6thread|17bad_function_call|"
    r"13basic_istreamI|19basic_istringstreamI))|"
    r"__Z(T[ISTV]+)(St11logic_error|NSt3__1(17bad_function_call|19basic_istringstreamI\w*))|"
    r"__Zd[la]Pvm(St11align_val_t)?|___dynamic_cast|__ZSt13set_terminatePFvvE$"
)
FRAMEWORKS = {
    "Accelerate": ["_cblas_sgemm$NEWLAPACK"],
    "Foundation": [],
    "Metal": [],
    "QuartzCore": [],
}


def stand_in(folder: Path, path: str, names: list[str]) -> Path:
    """Writes a library's list of symbols in the format that linkers for macOS read."""
    file = folder / f"{Path(path).stem}.tbd"
    listed = ", ".join(f"'{x}'" for x in names)
    file.write_text(
        f"--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '{path}'\n"
        f"exports:\n  - targets: [ arm64-macos ]\n    symbols: [ {listed} ]\n...\n"
    )
    return file


def libcxx(objects: list[Path]) -> list[str]:
    """Returns the symbols of the C++ library that these objects may need."""
    libraries = [*(SITE / "mlx" / "lib").glob("*.dylib"), *SITE.glob("mlx/core.*.so")]
    known = {x for library in libraries for x in symbols(library)[0]}
    own = {x for file in objects for x in symbols(file)[0] if OLD_LIBCXX.match(x)}
    names = {x for x in known if x.startswith(("__Z", "___cxa", "___gxx"))} | own
    return sorted(names)


def link(arguments: list[str]) -> list[str | Path]:
    """Converts a command for Apple's linker to one for zig."""
    kept: list[str | Path] = []
    python: list[str] = []
    rest = iter(arguments)
    folder = Path(arguments[arguments.index("-o") + 1] + ".libraries")
    folder.mkdir(exist_ok=True)
    for argument in rest:
        if argument == "-framework":
            name = next(rest)
            path = f"/System/Library/Frameworks/{name}.framework/Versions/A/{name}"
            kept.append(stand_in(folder, path, FRAMEWORKS[name]))
        elif argument == "-isysroot":
            next(rest)
        elif argument == "-bundle":  # zig links libraries but not bundles, a type of loadable file
            kept.append("-shared")
        elif argument.startswith("-Wl,@"):  # each line has -U and a name from CPython
            python += Path(argument.removeprefix("-Wl,@")).read_text().split()
        elif not argument.startswith(("-Wl,", "-F", "-mmacosx-version-min", "-O", "-D", "-Werror")):
            kept.append(argument)
    objects = [Path(str(x)) for x in kept if str(x).endswith(".o")]
    objects += (BUILD / "cmake" / "CMakeFiles" / "nanobind-static.dir").rglob("*.o")
    # Apple's linker rejects a symbol that two files define. Zig's linker finds only some of them.
    times = Counter(x for file in objects for x in definitions(file))
    if twice := sorted(x for x, n in times.items() if n > 1):
        sys.exit(f"duplicate symbol definition: {', '.join(twice)}")
    cpython = sorted({x for x in python if x != "-U"})
    kept += [stand_in(folder, "/Python.dylib", cpython), stand_in(folder, LIBCXX, libcxx(objects))]
    # Otherwise zig would first compile a library for checks that the objects do not contain.
    return zig("c++", "-target", TARGET, "-nostdlib++", "-fno-sanitize=undefined", *kept)


def command_of(arguments: list[str]) -> list[str | Path]:
    if "-c" not in arguments and "-fsyntax-only" not in arguments:
        return link(arguments)
    plain = [x for x in arguments if not x.startswith("-F")]
    return zig("c++", "-target", TARGET, *plain, *COMPILE)


if __name__ == "__main__":
    sys.exit(subprocess.run(command_of(sys.argv[1:]), env=environment(), check=False).returncode)
