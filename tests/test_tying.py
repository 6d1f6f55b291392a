"""Tests adapters for an embedding that is also the head: how mlx-lm and PEFT apply them, and which
adapters are refused."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mlx_segtrain
from lib import adapter_files
from lib.checks import random_adapter
from lib.folders import write_llama
from lib.oracle import assert_close
from lib.runs import config_of
from mlx_segtrain import InputError, lora, train
from mlx_segtrain.adapters import read_adapter, read_stored, write_adapter
from mlx_segtrain.adapters.conversion import export, import_
from mlx_segtrain.adapters.discovery import adapters
from mlx_segtrain.adapters.folding import fold
from mlx_segtrain.adapters.merging import merge, weighted
from mlx_segtrain.adapters.writing import About
from mlx_segtrain.lora.folder import CONFIG, PEFT_WEIGHTS, WEIGHTS
from mlx_segtrain.models import chain_of, load_base
from mlx_segtrain.planning.run import full_batch, plan_run
from mlx_segtrain.serving.confined.parent import Confined
from mlx_segtrain.serving.generation.mounting import read_base, read_mounted
from mlx_segtrain.training import evaluate

pytestmark = pytest.mark.acceptance

TOKENS = [[1, 5, 9, 200, 17, 33, 80, 81]]
EMBEDDING, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"
RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory, llama):
    """Returns a tied and an untied base with equal weights. The untied head is a copy of the
    embedding."""
    folder = tmp_path_factory.mktemp("bases")
    untied = write_llama(folder / "untied", tied=False)
    weights = dict(mx.load(str(llama / "model.safetensors")))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(untied / "model.safetensors"), weights, {"format": "mlx"})
    return {"tied": llama, "untied": untied}


def peft_folder(path: Path, kind: str, base: Path | None = None, tie: bool = False) -> Path:
    """Writes an adapter in PEFT's format and returns its folder."""
    normal = {name: mx.random.normal((RANK, n), key=mx.random.key(i)) * 0.1
              for i, (name, n) in enumerate([("ea", 300), ("eb", 64), ("ha", 64), ("hb", 300),
                                             ("qa", 64), ("qb", 64)])}  # fmt: skip
    prefix = "base_model.model."
    embedding = {
        f"{prefix}{EMBEDDING}.lora_embedding_A": normal["ea"],
        f"{prefix}{EMBEDDING}.lora_embedding_B": normal["eb"].T,
    }
    own = {
        f"{prefix}{HEAD}.lora_A.weight": normal["ha"],
        f"{prefix}{HEAD}.lora_B.weight": normal["hb"].T,
    }
    twin = {
        f"{prefix}{HEAD}.lora_A.weight": normal["eb"],
        f"{prefix}{HEAD}.lora_B.weight": normal["ea"].T,
    }
    linear = {
        f"{prefix}{Q}.lora_A.weight": normal["qa"],
        f"{prefix}{Q}.lora_B.weight": normal["qb"].T,
    }
    tensors = {
        "embedding": embedding | linear,
        "head": own | linear,
        "apart": embedding | own,
        "twins": embedding | twin | linear,
    }[kind]
    path.mkdir()
    tensors = {name: mx.contiguous(x) for name, x in tensors.items()}
    mx.save_safetensors(str(path / PEFT_WEIGHTS), tensors, {"format": "pt"})
    targets = {name.removeprefix(prefix).split(".lora")[0] for name in tensors if "lora" in name}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "target_modules": sorted(targets), "ensure_weight_tying": tie, "bias": "none",
        "base_model_name_or_path": str(base) if base else None, "init_lora_weights": True,
    }  # fmt: skip
    (path / CONFIG).write_text(json.dumps(config))
    return path


def logits(base, folder=None):
    return mlx_segtrain.load(base, folder)[0](mx.array(TOKENS))


def readers(base, data, tmp_path):
    """Returns all functions that read an adapter for a base, by name."""

    def warm(run):
        def start(folder):
            config = config_of(base, data, tmp_path / "run", iters=1, max_seq_length=64)
            run(config.model_copy(update={"warm_start": folder}))

        return start

    return {
        "load": lambda folder: mlx_segtrain.load(base, folder),
        "evaluate": lambda folder: evaluate(config_of(base, data, folder), folder),
        "import": lambda folder: import_(folder, tmp_path / "out", base),
        "export to mlx-lm": lambda folder: export(
            folder, tmp_path / "out", "mlx-lm", model_dir=base
        ),
        "export to PEFT": lambda folder: export(folder, tmp_path / "out", "peft", model_dir=base),
        "merge": lambda folder: merge([folder], tmp_path / "out", model_dir=base),
        "merge into": lambda folder: fold(
            weighted([folder], model_dir=base), base, tmp_path / "out"
        ),
        "serve": lambda folder: read_mounted("a", folder, read_base(base, Confined(base))),
        "plan": warm(lambda config: plan_run(config, full_batch(config))),
        "warm start": warm(train),
    }


READERS = list(readers(Path(), Path(), Path()))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("kind", "tie", "says"),
    [
        ("embedding", False, "leaves the head unchanged, but this model has one weight for both"),
        ("head", False, "leaves the embedding unchanged, but this model has one weight for both"),
        ("head", True, "leaves the embedding unchanged, but this model has one weight for both"),
        ("apart", False, "differ, but this model has one weight for both"),
        ("apart", True, "differ, but this model has one weight for both"),
    ],
)
def test_what_peft_means_of_one_of_the_two_is_refused(
    kind, tie, says, reader, bases, data, tmp_path
):
    folder = peft_folder(tmp_path / "theirs", kind, tie=tie)
    if reader == "plan" and kind == "apart":  # `plan` reads only names
        readers(bases["tied"], data, tmp_path)[reader](folder)
    else:
        with pytest.raises(InputError, match=says):
            readers(bases["tied"], data, tmp_path)[reader](folder)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()
    found = adapters([tmp_path], bases["tied"])
    assert [one.fits for one in found] == [kind == "apart"] and found[0].fault is None


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_one_update_of_both_is_ours(reader, tie, bases, data, tmp_path):
    """Equal updates of the embedding and the head are read as one update of both, whether or not
    PEFT has tied them."""
    folder = peft_folder(tmp_path / "theirs", "twins", tie=tie)
    readers(bases["tied"], data, tmp_path)[reader](folder)
    assert [one.fits for one in adapters([folder], bases["tied"])] == [True]
    found = read_stored(folder, tied=True)
    assert set(found.tensors) == {EMBEDDING, Q} and found.tied is True


@pytest.mark.parametrize("kind", ["embedding", "head", "apart", "twins"])
def test_beside_a_head_each_is_an_update_of_its_own(kind, bases, data, tmp_path):
    folder = peft_folder(tmp_path / "theirs", kind)
    import_(folder, tmp_path / "ours", bases["untied"])
    expected = logits(bases["untied"], folder)
    assert_close("imported", logits(bases["untied"], tmp_path / "ours"), expected, 1e-6)
    stock, _ = mlx_lm.load(str(bases["untied"]), adapter_path=str(tmp_path / "ours"))
    assert_close("mlx-lm", stock(mx.array(TOKENS)), expected, 1e-5)
    assert [one.fits for one in adapters([folder], bases["untied"])] == [True]


def test_the_base_that_an_adapter_names_is_looked_at(bases, tmp_path):
    folder = peft_folder(tmp_path / "a", "embedding", bases["tied"])
    for run in (lambda: import_(folder, tmp_path / "out"), lambda: read_stored(folder),
                lambda: merge([folder, folder], tmp_path / "out")):  # fmt: skip
        with pytest.raises(InputError, match="leaves the head unchanged"):
            run()
    folder = peft_folder(tmp_path / "b", "embedding", bases["untied"])
    assert read_stored(folder).tied is False
    merge([folder, folder], tmp_path / "sum")
    assert read_stored(tmp_path / "sum").tied is False


def test_without_a_base_it_cannot_be_told(tmp_path):
    for kind in ("embedding", "apart", "twins"):
        folder = peft_folder(tmp_path / kind, kind, Path("nobody/knows"))
        with pytest.raises(InputError, match="without the base model it is unknown"):
            import_(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Without the base, the configuration and the equality of the two updates imply that they are
    # tied.
    folder = peft_folder(tmp_path / "tied", "twins", tie=True)
    import_(folder, tmp_path / "out")
    assert read_stored(tmp_path / "out").tied is True
    # An update of the head alone is refused only once the base is known to have no separate head.
    folder = peft_folder(tmp_path / "head", "head")
    import_(folder, tmp_path / "ours")


# ---- our own files


@pytest.fixture(scope="module")
def runs(bases, data, tmp_path_factory):
    """Trains an adapter of the embedding for each base, and returns the folder that contains the
    runs."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, base in bases.items():
        how = {"target_modules": ["embed_tokens", "q_proj"], "iters": 2, "learning_rate": 2e-2}
        train(config_of(base, data, folder / kind, **how))
    return folder


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_our_files_say_for_which_kind_they_are(kind, runs, bases, data, tmp_path):
    other = {"tied": "untied", "untied": "tied"}[kind]
    config = json.loads((runs / kind / CONFIG).read_text())
    assert config["segtrain"]["tied"] is (kind == "tied")
    logits(bases[kind], runs / kind)
    for name, read in readers(bases[other], data, tmp_path).items():
        with pytest.raises(InputError, match="separate head"):
            read(runs / kind)
        assert not (tmp_path / "out").exists(), name
    assert [one.fits for one in adapters([runs / kind], bases[other])] == [False]
    for name, read in readers(bases[kind], data, tmp_path).items():
        if not name.startswith(("import", "export", "merge")):
            read(runs / kind)


def test_adapters_for_both_kinds_have_no_sum(runs, tmp_path):
    with pytest.raises(InputError, match="to different models: in one model the embedding is"):
        weighted([runs / "tied", runs / "untied"])
    merge([runs / "tied", runs / "tied"], tmp_path / "sum")
    assert read_stored(tmp_path / "sum").tied is True


def test_what_does_not_touch_the_embedding_is_for_both_kinds(bases, data, tmp_path):
    train(config_of(bases["tied"], data, tmp_path / "a", iters=1, target_modules=["q_proj"]))
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["segtrain"]["tied"] is None
    logits(bases["untied"], tmp_path / "a")


def test_mlx_lm_s_files_mean_the_weight(bases, tmp_path):
    """As in stock mlx-lm, the head uses the updated weight only in the tied base."""
    pair = mx.random.normal((300, 4)) * 0.1, mx.random.normal((4, 64)) * 0.1
    (tmp_path / "a").mkdir()
    flat = {f"{EMBEDDING}.lora_a": pair[0], f"{EMBEDDING}.lora_b": pair[1]}
    mx.save_safetensors(str(tmp_path / "a" / WEIGHTS), flat)
    how = {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": [EMBEDDING]}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": how}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    for kind, base in bases.items():
        stock, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "a"))
        assert_close(kind, logits(base, tmp_path / "a"), stock(mx.array(TOKENS)), 1e-5)
        import_(tmp_path / "a", tmp_path / kind, base)
        assert read_stored(tmp_path / kind).tied is (kind == "tied")


@pytest.mark.parametrize("reader", READERS)
def test_a_head_of_another_model_is_refused_with_the_reason(reader, bases, data, tmp_path):
    pair = mx.ones((64, 4)), mx.ones((4, 300))
    write_adapter(tmp_path / "a", lora.Adapter({HEAD: pair}, {HEAD: 1.0}), About("m"))
    with pytest.raises(InputError, match=r"changes the head .* has no separate head"):
        readers(bases["tied"], data, tmp_path)[reader](tmp_path / "a")


def test_a_merge_into_the_base_changes_what_the_head_computes_with(bases, tmp_path):
    chain = chain_of(load_base(bases["tied"])[0])
    adapter = random_adapter(chain, {EMBEDDING: 4}, 1.0, 0.1)
    write_adapter(tmp_path / "a", adapter, About("m"))
    assert read_adapter(tmp_path / "a", chain).tied is True
    fold(weighted([tmp_path / "a"]), bases["tied"], tmp_path / "out")
    expected = logits(bases["tied"], tmp_path / "a")
    assert_close("folded", logits(tmp_path / "out"), expected, 1e-5)


# ---- comparison with PEFT


def peft_logits(hf, base, folder):
    """Returns the logits that transformers computes with the adapter, loaded by PEFT."""
    return adapter_files.peft_logits(hf, base, folder, TOKENS)


@pytest.mark.parametrize("tie", [True, False])
def test_peft_computes_with_one_update_of_both_as_we_do(tie, hf, bases, tmp_path):
    folder = peft_folder(tmp_path / "theirs", "twins", tie=tie)
    theirs = peft_logits(hf, bases["tied"], folder)
    ours = logits(bases["tied"], folder)
    assert_close("logits", ours, theirs, 1e-4)
    assert mx.abs(ours - logits(bases["tied"])).max() > 0.1


@pytest.mark.parametrize("kind", ["embedding", "head", "apart"])
def test_what_we_refuse_is_something_else_in_peft(kind, hf, bases, tmp_path):
    """On the tied base, PEFT applies these adapters as if the head were a separate weight."""
    folder = peft_folder(tmp_path / "theirs", kind)
    theirs = peft_logits(hf, bases["tied"], folder)
    assert_close("as beside a head", logits(bases["untied"], folder), theirs, 1e-4)


@pytest.mark.parametrize("knows", [True, False])
def test_ours_exported_has_our_logits_in_peft(knows, hf, runs, bases, tmp_path):
    """Tests PEFT with and without support for ensure_weight_tying."""
    done = export(runs / "tied", tmp_path / "peft", "peft", names="text")
    assert done.difference <= 1e-6 * done.update
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert config["ensure_weight_tying"] is True and HEAD in config["target_modules"]
    import_(tmp_path / "peft", tmp_path / "again", bases["tied"])
    ours = logits(bases["tied"], runs / "tied")
    assert_close("imported", logits(bases["tied"], tmp_path / "again"), ours, 1e-6)
    assert mx.abs(ours - logits(bases["tied"])).max() > 1e-3
    if not knows:
        del config["ensure_weight_tying"]
        (tmp_path / "peft" / CONFIG).write_text(json.dumps(config))
    assert_close("PEFT", peft_logits(hf, bases["tied"], tmp_path / "peft"), ours, 1e-4)


def test_peft_s_own_tied_adapter_is_imported(hf, bases, tmp_path):
    """The adapter is created and saved by PEFT."""
    model = adapter_files.in_transformers(hf, bases["tied"])
    modules = ["embed_tokens", "q_proj"]
    how = {"r": 4, "lora_alpha": 6, "target_modules": modules, "ensure_weight_tying": True}
    theirs = mx.array(hf.saved_by_peft(tmp_path / "theirs", model, np.array(TOKENS), **how))
    import_(tmp_path / "theirs", tmp_path / "ours", bases["tied"])
    assert_close("logits", logits(bases["tied"], tmp_path / "ours"), theirs, 1e-4)
    stock, _ = mlx_lm.load(str(bases["tied"]), adapter_path=str(tmp_path / "ours"))
    assert_close("mlx-lm", stock(mx.array(TOKENS)), theirs, 1e-4)
