import sys

from . import commands, cross, emulator, msl
from .machine import Found, fetch, set_up, step


def main() -> None:
    with step("MLX's wheels for macOS"):
        print(f"{fetch() / 1e6:.0f} MB downloaded")
    set_up()
    with step("C++ for macOS on arm64"):
        cross.configure()
        print(f"{cross.build()} files compiled and linked")
    with step("the emulator's C++ of a kernel, for macOS"):
        print(f"{emulator.check()} compiled")
    with step("planted faults in C++"):
        print(f"{cross.check_host_faults()} found")
    with step("planted faults in symbols"):
        print(f"{cross.check_symbol_faults()} found")
    with step("Metal text"):
        print(f"{msl.check()} kernels compiled")
    with step("planted faults in Metal text"):
        print(f"{msl.check_faults()} found")
    with step("commands of the Makefile, as on a Mac"):
        print(f"{commands.check()} targets")


if __name__ == "__main__":
    try:
        main()
    except Found as error:
        sys.exit(f"error: {error}")
