"""Checks with `make -n` that every target uses only commands that a Mac has.

macOS comes with GNU make 3.81 (from 2006) and BSD tools.
"""

import os
import re

from .machine import BUILD, ROOT, Found, run

MAKEFILE = ROOT / "Makefile"
#: Features that were added to GNU make after version 3.81.
NEWER_MAKE = {
    ".ONESHELL": r"^\.ONESHELL",
    "$(file)": r"\$\(file ",
    "$(intcmp) and $(let)": r"\$\((intcmp|let) ",
    "assignment by !=": r"^\w+ *!=",
    "assignment by :::= or ::=": r":{2,3}=",
    "grouped targets (&:)": r"&:",
    "undefine": r"^undefine ",
    "private": r"^\S+: private ",
    "$(shell) with .SHELLSTATUS": r"\.SHELLSTATUS",
}
#: Commands and options that BSD tools do not have or interpret differently.
NOT_ON_A_MAC = {
    "sed -i without an ending": r"\bsed (-\w+ )*-i ",
    "sed -r": r"\bsed -\w*r",
    "grep -P": r"\bgrep -\w*P",
    "readlink -f": r"\breadlink -f",
    "cp --options": r"\b(cp|mv|rm|mkdir|ln|touch) [^;|&\n]*--\w",
    "date -d": r"\bdate (-\w+ )*(-d|--date)",
    "stat -c": r"\bstat (-c|--\w)",
    "xargs -r or -d": r"\bxargs [^|;\n]*(-r|-d|--\w)",
    "find -printf": r"\bfind [^|;\n]*-(printf|regextype)",
    "nproc": r"\bnproc\b",
    "timeout": r"(^|[;|&] *)timeout ",
    "realpath": r"\brealpath\b",
    "seq -w, tac, shuf, sha256sum, md5sum, free, ldd": r"\b(tac|shuf|sha256sum|md5sum|free|ldd)\b",
    "getconf, mktemp --options": r"\bmktemp --",
    "env -0": r"\benv -0",
}
#: A command that runs only on machines with apt-get.
LINUX_ONLY = re.compile(r"^for name in chromium.*?; fi$", re.M | re.S)


def as_on_a_mac() -> dict[str, str]:
    """Returns an environment in which uname prints Darwin."""
    folder = BUILD / "darwin"
    folder.mkdir(parents=True, exist_ok=True)
    uname = folder / "uname"
    uname.write_text(
        '#!/bin/sh\ncase "$1" in -m) echo arm64;; -sm) echo Darwin arm64;; *) echo Darwin;; esac\n'
    )
    uname.chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "MAKEFLAGS": "", "MFLAGS": ""}


def check() -> int:
    text = MAKEFILE.read_text()
    for what, pattern in NEWER_MAKE.items():
        if match := re.search(pattern, text, re.M):
            raise Found(f"Makefile: make on a Mac does not support {what}: {match[0]!r}")
    targets = re.findall(r"^([a-z]+):.*## ", text, re.M)
    for target in targets:
        done = run(["make", "-n", "-B", target], env=as_on_a_mac(), cwd=ROOT)
        if done.returncode:
            raise Found(f"make {target} fails on a Mac\n{done.stderr}")
        commands = LINUX_ONLY.sub("", done.stdout)
        for what, pattern in NOT_ON_A_MAC.items():
            if match := re.search(pattern, commands, re.M):
                raise Found(f"make {target} uses {what}, which a Mac does not have: {match[0]!r}")
        if re.search(r"mlx\[cpu\]|\[[\w,]*\bcpu\b", commands):
            raise Found(f"make {target} installs MLX's CPU backend for Linux on a Mac")
    return len(targets)
