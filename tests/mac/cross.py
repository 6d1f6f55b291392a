"""Compiles and links every C++ file for macOS, and checks that planted faults are found."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

from . import faults
from .compiler import command_of
from .machine import BIN, BUILD, HERE, ROOT, Found, at_once, environment, run
from .macho import symbols

CMAKE = BUILD / "cmake"
MODULE = "_core"


def tool(name: str) -> Path:
    """Returns the path of a program in this virtual environment."""
    return Path(sys.executable).with_name(name)


def configure() -> None:
    """Runs CMake with the settings for a Mac."""
    command = [
        *(tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", CMAKE),
        f"-DCMAKE_TOOLCHAIN_FILE={HERE / 'toolchain.cmake'}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPython_INCLUDE_DIR={BUILD / 'headers'}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        # The code is only compiled, so -O1 suffices: -O3 would take a third longer, and with -O0
        # zig would add checks.
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    ]
    if (done := run(command, env=environment())).returncode:
        raise Found(f"CMake cannot configure the project for macOS\n{done.stdout}{done.stderr}")


def build() -> int:
    """Compiles and links all files, and returns their number."""
    done = run([tool("ninja"), "-C", CMAKE, "-k", "0", MODULE], env=environment())
    if done.returncode:
        errors = re.findall(r"^.*(?:error|warning): .*$", done.stdout, re.M)
        raise Found(
            "the package does not build for macOS\n" + ("\n".join(errors) or done.stdout[-4000:])
        )
    (module,) = CMAKE.glob(f"{MODULE}.*.so")
    given = symbols(module)[1]
    if f"_PyInit_{MODULE}" not in given:
        raise Found(f"{module.name} is not a Python module: it exports {sorted(given)[:5]}")
    return len(compile_commands())


def compile_commands() -> dict[Path, list[str]]:
    """Returns the compiler's arguments for each file, without the names of the file and of its
    output."""
    commands = {}
    for entry in json.loads((CMAKE / "compile_commands.json").read_text()):
        arguments = shlex.split(entry["command"])[1:]
        file = Path(entry["file"])
        # CMake generates a file that includes all files that are compiled as one.
        included = re.findall(r'^#include "(.+)"', file.read_text(), re.M)
        for source in included if file.parent.name == "Unity" else [file]:
            commands[Path(source)] = arguments[: arguments.index("-o")]
    return commands


def check_host_faults() -> int:
    """Checks that each fault in a C++ file causes an error that names the fault. Returns the number
    of faults."""
    folder = BUILD / "faults"
    shutil.rmtree(folder, ignore_errors=True)
    commands = compile_commands()

    def says(fault: faults.Text) -> str:
        source = ROOT / fault.file
        text = source.read_text()
        if fault.old not in text:
            raise Found(f"{fault.what}: {fault.file} does not contain {fault.old!r}")
        broken = folder / fault.what.replace(" ", "_") / source.name
        broken.parent.mkdir(parents=True)
        broken.write_text(text.replace(fault.old, fault.new, 1))
        made = ["-c", str(broken), "-o", str(broken.with_suffix(".o"))]
        done = run(command_of([*commands[source], *made]), env=environment())
        return done.stderr if done.returncode else ""

    return compare(faults.HOST, at_once(says, faults.HOST))


def check_symbol_faults() -> int:
    """Checks that linking fails if a module needs a symbol that a Mac does not have. Returns the
    number of faults."""
    folder = BUILD / "symbols"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    done = run([tool("ninja"), "-C", CMAKE, "-t", "commands", MODULE], env=environment())
    last = done.stdout.strip().split("\n")[-1]
    linking = shlex.split(last.removeprefix(": && ").removesuffix(" && :"))[1:]

    def says(fault: faults.Symbol) -> str:
        source = folder / f"{fault.what.replace(' ', '_')}.cpp"
        source.write_text(fault.source)
        made = source.with_suffix(".o")
        done = run(command_of(["-c", str(source), "-o", str(made)]), env=environment())
        if done.returncode:
            raise Found(f"{fault.what}: the code to link does not compile\n{done.stderr}")
        text = shlex.join(linking)
        if fault.without not in text:
            raise Found(f"{fault.what}: the linker's command does not contain {fault.without!r}")
        arguments = shlex.split(text.replace(fault.without, "") if fault.without else text)
        arguments[arguments.index("-o") + 1] = str(source.with_suffix(".so"))
        done = run([BIN / "c++", *arguments, made], env=environment(), cwd=CMAKE)
        return done.stderr if done.returncode else ""

    return compare(faults.SYMBOLS, at_once(says, faults.SYMBOLS))


def compare(planted, said: list[str]) -> int:
    """Raises an error that lists the faults whose expected message is missing."""
    missed = [
        f"{fault.what}: expected {fault.says!r}, got {text[:500] or 'no error'}"
        for fault, text in zip(planted, said, strict=True)
        if not re.search(fault.says, text)
    ]
    if missed:
        raise Found("some planted faults were not found:\n" + "\n".join(missed))
    return len(planted)
