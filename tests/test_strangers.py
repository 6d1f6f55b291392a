"""Tests untrusted adapter files: randomly modified files are either read or refused with one
sentence.

MUTATIONS is the number of files to test.
"""

import json
import os
import shutil
import struct
import time

import mlx.core as mx
import pytest

from lib.adapter_files import DOWN1, MLX_LM, PEFT, Q0, RANK, factors_of, write_mlx, write_peft
from lib.mutators import Mutator
from mlx_segtrain import InputError
from mlx_segtrain.adapters import ranks_in, read_adapter, read_stored
from mlx_segtrain.adapters.conversion import export, import_
from mlx_segtrain.adapters.discovery import look
from mlx_segtrain.models import chain_of, load_base
from mlx_segtrain.safetensors import read_header

pytestmark = pytest.mark.acceptance

MUTATIONS = int(os.environ.get("MUTATIONS", 3000))


@pytest.fixture(scope="module")
def chain(llama):
    return chain_of(load_base(llama)[0])


@pytest.fixture
def folders(chain, tmp_path):
    """Returns valid adapters in the formats of mlx-lm and PEFT."""
    factors = factors_of(chain, {Q0: RANK, DOWN1: RANK})
    patterns = {"rank_pattern": {"q_proj": RANK}, "alpha_pattern": {"layers.1.*down": 8}}
    return [
        write_mlx(tmp_path / "in" / "mlx", factors),
        write_peft(tmp_path / "in" / "peft", factors, **patterns),
    ]


def test_whatever_is_in_the_files(chain, folders, tmp_path):
    """Reading returns values or raises a one-sentence error. It never prints a traceback, hangs or
    writes anything."""
    mutator = Mutator(0)
    whole = {f: {x.name: x.read_bytes() for x in f.iterdir()} for f in folders}
    listing = sorted(tmp_path.rglob("*"))
    refused, slowest = 0, 0.0
    for i in range(MUTATIONS):
        folder = folders[i % 2]
        (name,) = (name for name in whole[folder] if name.endswith(".safetensors"))
        if mutator.chance.random() < 0.5:
            (folder / name).write_bytes(mutator.tensors(whole[folder][name]))
        else:
            text = mutator.text(json.loads(whole[folder]["adapter_config.json"]))
            (folder / "adapter_config.json").write_bytes(text)
        began = time.monotonic()
        try:
            ranks_in(folder)
            adapter = read_stored(folder)
            mx.eval(list(adapter.tensors.values()))
            read_adapter(folder, chain)
            if i % 10 == 0:
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
                import_(folder, tmp_path / "out")
                shutil.rmtree(tmp_path / "out")
                export(folder, tmp_path / "out", "peft", names="text")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1500
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        look(folder)
        slowest = max(slowest, time.monotonic() - began)
        for name, own in whole[folder].items():
            (folder / name).write_bytes(own)
    assert sorted(tmp_path.rglob("*")) == listing
    assert refused > MUTATIONS / 3 and slowest < 5
    print(f"{MUTATIONS} files, {refused} refused, the slowest took {slowest:.2f} s")


def header_of(**entry):
    own = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    return {"a": {**own, **entry}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (header_of(), 15, "its header describes 16 bytes of data, but the file has 15"),
        (header_of(), 17, "its header describes 16 bytes of data, but the file has 17"),
        (header_of(shape=[2, 3]), 16, "invalid shape, data type, or offset for tensor"),
        (header_of(shape=[-2, -2]), 16, "integer `-2`, expected usize"),
        (header_of(shape=[4, *[1] * 8]), 16, "a has too many dimensions"),
        (header_of(shape=[2.0, 2]), 16, r"floating point `2\.0`, expected usize"),
        (header_of(shape=[2**62, 4]), 16, "overflow computing buffer size from shape"),
        (header_of(data_offsets=[16, 0]), 16, "invalid offset for tensor `a`"),
        (header_of(data_offsets=[8, 24]), 24, "invalid offset for tensor `a`"),
        (header_of(data_offsets=[0]), 16, "invalid length 1, expected a tuple of size 2"),
        (header_of(dtype="F99"), 16, "unknown variant `F99`"),
        (header_of(dtype="\x1b[31m"), 16, r"unknown variant `\\x1b\[31m`"),
        (header_of(dtype=5), 16, "integer `5`, expected string"),
        (header_of(dtype={"F32": None}), 16, "a has the invalid dtype {'F32': None}"),
        ({"a": ["F32", [2, 2], [0, 16]]}, 16, "its entry for a must have dtype"),
        (header_of(more=1), 16, "its entry for a must have dtype"),
        ({"a\nb": header_of()["a"]}, 16, "is not a valid tensor name"),
        ({"": header_of()["a"]}, 16, "is not a valid tensor name"),
        ({"__metadata__": {"x": 1}, **header_of()}, 16, "integer `1`, expected a string"),
        ([], 0, "invalid type: sequence, expected struct"),
        ({**header_of(), "b": header_of()["a"]}, 16, "invalid offset for tensor `[ab]`"),
    ],
)
def test_headers_that_do_not_fit_their_file(header, data, message, tmp_path):
    text = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(InputError, match=message) as error:
        read_header(file)
    assert str(error.value).startswith(f"{file} is not a readable safetensors file: ")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x01", b"\xff" * 8, struct.pack("<Q", 10) + b"{}", struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 4) + b"\xff\xfe{}", struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 31) + b'{"__metadata__":{},"a":1,"a":2}',
    ],
)  # fmt: skip
def test_files_that_are_none(content, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        read_header(file)


def test_a_header_may_be_large_but_not_too_large(tmp_path):
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", 101 << 20))
        opened.truncate(102 << 20)
    with pytest.raises(InputError, match="the header is too long"):
        read_header(file)


def test_pickles_are_not_read(tmp_path):
    import pickle

    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="contains neither"):
        read_stored(tmp_path)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "a*a*a*a*a*b", ".*" * 30, ".?" * 31, r"\\\\*" * 8, "(.*)+" * 9]
)
def test_patterns_that_would_take_for_ever(pattern, chain, tmp_path):
    """Python's `re` would need exponential time for some of these patterns. RE2, which is used
    instead, is fast."""
    factors = factors_of(chain, {Q0: RANK})
    folder = write_peft(tmp_path, factors, rank_pattern={pattern: RANK, "q_proj": RANK})
    begun = time.monotonic()
    assert read_stored(folder).tensors.keys() == {Q0}
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        *[("a" * 2000, "2000 characters"), ("(((a{99}){99}){99}){99}", "RE2 does not support")],
        *[
            ("(?=a)", "RE2 does not support"),
            ("[", "RE2 does not support"),
            ("\ud800", "does not support"),
        ],
    ],
)
def test_patterns_that_are_not_taken(pattern, message, chain, tmp_path):
    factors = factors_of(chain, {Q0: RANK})
    folder = write_peft(tmp_path, factors, rank_pattern={pattern: RANK})
    with pytest.raises(InputError, match=message):
        read_stored(folder)


def test_patterns_that_are_too_many(chain, tmp_path):
    factors = factors_of(chain, {Q0: RANK})
    folder = write_peft(tmp_path, factors, rank_pattern={f"a{i}": 3 for i in range(5001)})
    with pytest.raises(InputError, match="5001 patterns; the maximum is 5000"):
        read_stored(folder)


def test_integers_are_no_factors(chain, tmp_path):
    factors = factors_of(chain, {Q0: RANK})
    folder = write_mlx(tmp_path, factors, MLX_LM, dtype=mx.int32)
    with pytest.raises(InputError, match="has dtype I32, but factors must be"):
        read_stored(folder)
