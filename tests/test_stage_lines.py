"""Kernels of one op for several devices have the same stages: their `///` comments, in order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Section → (file, function) of its twins.
TWINS = {
    "attention forward": [
        ("csrc/cpu/attention.cpp", "attention"),
        ("cuda/attention.cu", "attention"),
        ("cuda/attention_hopper.cu", "attention_hopper"),
        ("metal/attention.metal", "attention"),
    ],
    **{
        section: [
            ("csrc/cpu/rows.cpp", name),
            ("cuda/glu.cu", name),
            ("metal/glu.metal", name),
        ]
        for section, name in (("glu forward", "glu"), ("glu backward", "glu_vjp"))
    },
}
#: Outputs of a kernel → the section that its function belongs to.
SECTIONS = {
    "o lse": "attention forward",
    "y": "glu forward",
    "dgate dup": "glu backward",
}
#: Metal's text is ASCII.
ASCII = str.maketrans({"·": " ", "ᵀ": "^T", "−": "-"})


def stages(text: str, function: str) -> list[str]:
    """The stage lines within the only function of this name, as ASCII."""
    bodies = re.findall(rf"^[\w ]*\bvoid {function}\(.*?^\}}", text, flags=re.M | re.S)
    assert len(bodies) == 1, f"{len(bodies)} functions are called {function}"
    return [line.translate(ASCII) for line in re.findall(r"^ +/// *(.*)$", bodies[0], flags=re.M)]


def kernels(text: str) -> dict[str, str]:
    """Name → outputs of the kernels that a text holds."""
    return dict(re.findall(r"^//: (\w+): .* -> (.*)$", text, flags=re.M))


@pytest.mark.parametrize("section", TWINS)
def test_twins_have_the_same_stages(section):
    found = {
        f"{file}: {function}": stages((ROOT / file).read_text(), function)
        for file, function in TWINS[section]
    }
    (first, lines), *others = found.items()
    assert lines, f"{first} has no stage lines"
    for name, other in others:
        assert other == lines, f"{name} and {first} differ"


def test_every_twin_is_listed():
    files = [*ROOT.glob("metal/*.metal"), *ROOT.glob("cuda/*.cu")]
    assert files
    for file in files:
        for name, outputs in kernels(file.read_text()).items():
            if outputs in SECTIONS:
                twin = (file.relative_to(ROOT).as_posix(), name)
                assert twin in TWINS[SECTIONS[outputs]], f"{twin} is in no section of TWINS"


def test_stages_are_those_of_the_function():
    text = """
__device__ void helper(int x) {
  /// not this one
}
template <int D>
__device__ void f(int x,
                  int y) {
  /// S = q·kᵀ − 1
  // a remark
    ///   indented
  }
}
/// of the next function
"""
    assert stages(text, "f") == ["S = q k^T - 1", "indented"]
