"""Tests that all version numbers in a release agree, and that wheels contain the license
notices."""

import tarfile
import zipfile
from pathlib import Path

import yaml

import release_check

VERSION = release_check.project("version")
INFO = f"mlx_segtrain-{VERSION}.dist-info"
WHEEL = [
    *("mlx_segtrain/py.typed", "mlx_segtrain/_core.pyi", "mlx_segtrain/_core.cpython-313.so"),
    *(f"{INFO}/sboms/sbom.cdx.json", f"{INFO}/licenses/LICENSE"),
    *(f"{INFO}/licenses/licenses/{name}.LICENSE" for name in release_check.NOTICES[1:]),
]


def wheel(folder: Path, names: list[str], version: str = VERSION) -> Path:
    path = folder / f"mlx_segtrain-{version}-cp313-cp313-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def test_the_versions_agree() -> None:
    assert release_check.faults_of_sources() == []


def test_a_wheel_with_all_of_it_is_good(tmp_path: Path) -> None:
    assert release_check.faults_of(wheel(tmp_path, WHEEL)) == []


def test_what_a_wheel_lacks_is_named(tmp_path: Path) -> None:
    for name in WHEEL:
        (fault,) = release_check.faults_of(wheel(tmp_path, [own for own in WHEEL if own != name]))
        assert fault.startswith("has no "), name


def test_a_wheel_of_another_version_or_with_foreign_files_is_refused(tmp_path: Path) -> None:
    faults = release_check.faults_of(wheel(tmp_path, [*WHEEL, "tests/x.py"], "9.9.9"))
    assert faults == [
        f"does not have version {VERSION} in its name",
        "has tests/x.py, which does not belong to the package",
    ]


def test_an_sdist_must_be_whole(tmp_path: Path) -> None:
    path = tmp_path / f"mlx_segtrain-{VERSION}.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    assert "has no CMakeLists.txt" in release_check.faults_of(path)


def test_the_workflows_and_templates_are_yaml_that_asks_for_a_report() -> None:
    folder = release_check.ROOT / ".github"
    for file in [*folder.glob("workflows/*.yml"), *folder.glob("ISSUE_TEMPLATE/*.yml")]:
        assert yaml.safe_load(file.read_text(encoding="utf-8")), file
    for name in ("bug", "performance", "mac"):
        text = (folder / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8")
        assert "mlx-segtrain doctor --report" in text
    release = yaml.safe_load((folder / "workflows" / "release.yml").read_text(encoding="utf-8"))
    assert "workflow_dispatch" in release[True]  # YAML parses the key `on` as true
    assert release["jobs"]["publish"]["permissions"]["id-token"] == "write"
