"""Tests that an op's kernels for different devices have the same stages, that is, equal `///`
comments in the same order.

Kernels with the same outputs on two devices are twins. A CPU function in csrc/ with the name of
such a kernel is a twin, too.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for pattern in ("metal/*.metal", "cuda/*.cu", "csrc/cpu/*.cpp", "csrc/ops/*/cpu.cpp")
    for file in sorted(ROOT.glob(pattern))
}
#: Kernels that have the same outputs as another kernel but are not its twins, with the reasons.
EXEMPT = {
    "attention_sum_parts": "adds up what parts of the heads gave attention_vjp_kv",
    "attention_queries_vjp": "one product with a dS that attention_scores_vjp wrote out",
    "attention_vjp_q_ds": "one product with a dS that attention_vjp_kv_ds wrote out",
}
#: Metal kernels are written in ASCII.
ASCII = str.maketrans({"·": " ", "ᵀ": "^T", "−": "-", "²": "^2"})


@functools.cache
def functions(text: str) -> dict[str, list[str]]:
    """Returns the bodies of the functions in a source text, by name. A body ends with a brace at
    the start of a line."""
    found: dict[str, list[str]] = {}
    for match in re.finditer(r"^[\w ]*\bvoid (\w+)\(", text, flags=re.M):
        end = text.find("\n}", match.start())
        found.setdefault(match[1], []).append(text[match.start() : end])
    return found


def stages(text: str, function: str) -> list[str]:
    """Returns the stage lines of the only function of this name, in ASCII."""
    bodies = functions(text).get(function, [])
    assert len(bodies) == 1, f"{len(bodies)} functions are named {function}"
    return [line.translate(ASCII) for line in re.findall(r"^ +/// *(.*)$", bodies[0], flags=re.M)]


@functools.cache
def kernels(text: str) -> dict[str, tuple[str, str]]:
    """Returns the outputs and the body of each kernel in a text, by kernel name."""
    _, *parts = re.split(r"^//: ", text, flags=re.M)
    found = {}
    for part in parts:
        line, body = part.split("\n", 1)
        name, _, outputs = re.split(r": | -> ", line)
        found[name] = outputs, body
    return found


def twins(texts: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Returns the twins as pairs of file and function, keyed by their outputs."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for file, text in texts.items():
        for name, (outputs, body) in kernels(text).items():
            if name not in EXEMPT:
                # Ignore `ds`, an additional output that only another kernel uses.
                outputs = outputs.removesuffix(" ds")
                found.setdefault(outputs, []).append((file, name, body))
    shared = {}
    for outputs, own in found.items():
        if len({file.split("/", 1)[0] for file, *_ in own}) > 1:
            names = {name for _, name, _ in own}
            shared[outputs] = [(file, called(texts[file], body)) for file, _, body in own]
            host = [
                (file, name)
                for file, text in texts.items()
                for name in sorted(names & functions(text).keys())
                if file.startswith("csrc/")
            ]
            # If several functions have this name, the functions without stages only distribute work
            # and call the one with stages.
            shared[outputs] += [twin for twin in host if stages(texts[twin[0]], twin[1])] or host
    return shared


@functools.cache
def called(text: str, body: str) -> str:
    """Returns the name of the function in the text that a kernel's body calls."""
    found = [name for name in functions(text) if re.search(rf"\b{name}\b *[<(]", body)]
    assert len(found) == 1, f"a kernel calls {found} instead of a single function: {body}"
    return found[0]


def differences(texts: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each pair of twins that differ or have no stages."""
    wrong = []
    for own in twins(texts).values():
        found = {f"{file}: {function}": stages(texts[file], function) for file, function in own}
        (first, lines), *others = found.items()
        wrong += [f"{name} has no stage lines" for name, theirs in found.items() if not theirs]
        wrong += [f"{name} and {first} differ" for name, theirs in others if theirs != lines]
    return wrong


TWINS = twins(TEXTS)


def test_twins_have_the_same_stages():
    assert differences(TEXTS) == []


def test_what_is_known_to_be_shared_is_found():
    """Without this check, the other tests would also pass if no twins were found."""
    names = {(file, function) for own in TWINS.values() for file, function in own}
    assert {file for file, _ in names} >= {
        "metal/attention.metal",
        "metal/attention_rows.metal",
        "metal/glu.metal",
        "cuda/attention.cu",
        "cuda/attention_hopper.cu",
        "cuda/attention_rows.cu",
        "cuda/glu.cu",
        "csrc/ops/attention/cpu.cpp",
        "csrc/cpu/rows.cpp",
    }
    for file, text in TEXTS.items():
        if file.startswith("metal/"):  # every Metal kernel has a CUDA twin
            for name, (outputs, _) in kernels(text).items():
                own = outputs.removesuffix(" ds")
                assert name in EXEMPT or own in TWINS, f"{name} of {file} has no twin"


@pytest.mark.parametrize(
    ("file", "function"), [twin for own in TWINS.values() for twin in own], ids=" ".join
)
def test_a_stage_that_is_changed_in_one_twin_is_seen(file, function):
    (body,) = functions(TEXTS[file])[function]
    lines = re.findall(r"^ +/// .*$", body, flags=re.M)
    assert lines
    for line in lines:
        for changed in ("", line + " twice", line.replace("///", "//")):
            other = body.replace(line, changed, 1)
            said = differences({**TEXTS, file: TEXTS[file].replace(body, other)})
            assert any(file in sentence for sentence in said), line


def test_a_twin_without_stages_is_seen():
    bare = {"metal/x.metal": "void f(int x) {\n}\n//: x: a -> b\nf<T>(a, b);\n"}
    cuda = {"cuda/x.cu": "void g(int x) {\n  /// b = a\n}\n//: x: a at -> b\ng(a, b);\n"}
    assert differences({**bare, **cuda}) == [
        "metal/x.metal: f has no stage lines",
        "cuda/x.cu: g and metal/x.metal: f differ",
    ]


def test_a_name_is_of_one_thing_on_every_device():
    outputs: dict[str, set[str]] = {}
    for text in TEXTS.values():
        for name, (own, _) in kernels(text).items():
            outputs.setdefault(name, set()).add(own)
    assert all(len(own) == 1 for own in outputs.values()), outputs


def test_no_exemption_outlives_its_kernel():
    assert EXEMPT.keys() <= {name for text in TEXTS.values() for name in kernels(text)}


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
