"""Checks the files of a release. `python tests/release_check.py dist/*` prints all faults.

`make release-check` also runs twine, check-wheel-contents and auditwheel.
"""

import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_MB = 10
#: Files that every wheel must contain in its .dist-info.
NOTICES = ("LICENSE", "nanobind", "robin_map", "mlx", "uPlot")


def project(name: str, text: str | None = None) -> str:
    """Returns a string value from pyproject.toml, without a TOML parser, which Python 3.10
    lacks."""
    text = text or (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'^{name} = "(.*)"', text, re.M)
    assert found, name
    return found[1]


def faults_of_sources() -> list[str]:
    """Returns a sentence for each mismatch between changelog, citation, SBOM and pyproject.toml."""
    version = project("version")
    faults = []
    if f"## [{version}]" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        faults.append(f"CHANGELOG.md has no section [{version}]")
    if f"version: {version}\n" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"):
        faults.append(f"CITATION.cff does not have version {version}")
    sbom = json.loads((ROOT / "licenses" / "sbom.cdx.json").read_text(encoding="utf-8"))
    parts = {part["name"]: part["version"] for part in sbom["components"]}
    if sbom["metadata"]["component"]["version"] != version:
        faults.append(f"licenses/sbom.cdx.json does not have version {version}")
    pins = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("mlx", "nanobind"):
        if f'"{name}=={parts[name]}"' not in pins:
            faults.append(f"licenses/sbom.cdx.json has {name} {parts[name]}, unlike pyproject.toml")
    page = ROOT / "python/mlx_segtrain/serving/page/vendor/uPlot.min.js"
    if f"(v{parts['uplot']})" not in page.read_text(encoding="utf-8")[:200]:
        faults.append(f"licenses/sbom.cdx.json has uplot {parts['uplot']}, unlike the page")
    return faults


def faults_of(file: Path) -> list[str]:
    """Returns a sentence for each fault in a wheel or sdist."""
    version = project("version")
    faults = []
    if file.stat().st_size > MOST_MB * 10**6:
        faults.append(f"is larger than {MOST_MB} MB")
    if not file.name.startswith(f"mlx_segtrain-{version}"):
        faults.append(f"does not have version {version} in its name")
    if file.suffix != ".whl":
        with tarfile.open(file) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        needed = (
            "pyproject.toml",
            "CMakeLists.txt",
            "csrc/segtrain.h",
            "tests/smoke.py",
            "LICENSE",
        )
        return faults + [f"has no {name}" for name in needed if name not in names]
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    needed = [r"mlx_segtrain/py\.typed", r"mlx_segtrain/_core\.pyi", r"mlx_segtrain/_core\..*so"]
    needed += [r"[^/]+\.dist-info/sboms/sbom\.cdx\.json"]
    needed += [rf"[^/]+\.dist-info/licenses/(.*/)?{name}(\.LICENSE)?" for name in NOTICES]
    for pattern in needed:
        if not any(re.fullmatch(pattern, name) for name in names):
            faults.append(f"has no {pattern}")
    foreign = [name for name in names if not name.startswith(("mlx_segtrain/", "mlx_segtrain-"))]
    return faults + [f"has {name}, which does not belong to the package" for name in foreign]


if __name__ == "__main__":
    found = faults_of_sources()
    for name in sys.argv[1:]:
        found += [f"{name} {fault}" for fault in faults_of(Path(name))]
    sys.exit("\n".join(found) or 0)
