"""Tests the error message for GPU work that macOS aborts. MLX reports the failure in a Metal
thread."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlx_segtrain import _core
from mlx_segtrain.errors import RunError
from mlx_segtrain.training.loop import Run
from mlx_segtrain.training.ranks import ALONE

METAL = "[METAL] Command buffer execution failed: "
SAID = {
    "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)": (
        "kept the display waiting"
    ),
    "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)": (
        "MLX_MAX_OPS_PER_BUFFER=1"
    ),
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": "no memory left",
    "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)": "last checkpoint",
}


@pytest.mark.parametrize("reason", SAID)
def test_a_failure_is_one_sentence(reason):
    text = _core.explain_failure(METAL + reason)
    assert SAID[reason] in text and text.count(". ") == 0 and text.endswith(".")


def test_a_run_without_host_memory_ends_with_a_sentence():
    said = "could not get 7 bytes of page-locked host memory: set activation_offloading to false."
    assert _core.explain_failure(f"[offload] {said}") == said


def test_other_errors_are_not_explained():
    assert _core.explain_failure("[matmul] Last dimension of first input") == ""


@pytest.mark.parametrize("reason", ["Impacting Interactivity", "Insufficient Memory"])
def test_a_run_ends_with_the_sentence(reason):
    """If memory is insufficient, the run first tries a plan with a lower peak."""
    asked = []

    def step(*what):
        raise RuntimeError(METAL + reason)

    step.plan = SimpleNamespace(cheaper=lambda: asked.append(reason))
    run = SimpleNamespace(step=step, state=SimpleNamespace(step=4), ranks=ALONE)
    with pytest.raises(RunError, match="step 5: ") as error:
        Run._in_memory(run, step)
    assert ("kept the display waiting" in str(error.value)) == (not asked)
    assert len(asked) == ("Memory" in reason)


THROWS = """
#include <stdexcept>
#include <string>
#include <thread>
extern "C" void fail(const char* what) {
  std::thread([&] { throw std::runtime_error(what); }).join();
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize(
    ("what", "said"), [(METAL + next(iter(SAID)), True), ("something else", False)]
)
def test_it_is_said_where_the_process_ends(what, said, tmp_path):
    source, library = tmp_path / "throws.cpp", tmp_path / "throws.so"
    source.write_text(THROWS)
    command = ["g++", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    script = (
        "import ctypes, sys; from mlx_segtrain import _core;"
        f"ctypes.CDLL({str(library)!r}).fail({what.encode()!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == -6
    assert ("error: macOS ended the run's work" in done.stderr) == said
    assert what in done.stderr
