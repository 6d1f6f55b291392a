"""Tests grouped help, flag aliases, suggestions for unknown flags, and shell completion."""

import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mlx_segtrain.commands import main as cli
from mlx_segtrain.commands.flags import in_groups
from mlx_segtrain.config import CALLED, FACETS, TrainConfig, flag, load_config
from mlx_segtrain.errors import InputError

RUN = ["--model", "m", "--data", "d"]


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def parsed(*argv: str) -> dict[str, object]:
    return vars(cli.parsers()[0].parse_args(argv))


def test_help_shows_what_matters_first_and_help_all_the_rest(capsys) -> None:
    short, long = printed(capsys, "train", "--help"), printed(capsys, "train", "--help-all")
    for text in ("--model", "--data", "--adapter", "--lr", "--epochs", "--batch-size", "--quiet"):
        assert text in short
    assert "--dpo-beta" not in short and "--help-all" in short
    assert all(flag(name) in long for name in TrainConfig.model_fields)
    assert 10 <= sum(f"  {flag(name)}" in short for name in TrainConfig.model_fields) <= 12
    titles = [line for line in long.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles.index("model and data:") < titles.index("training:") < titles.index("memory:")
    assert "mlx-segtrain train --config run.yaml --resume" in short
    assert sorted(in_groups()) == sorted(TrainConfig.model_fields)


@pytest.mark.parametrize("width", [80, 160])
def test_help_fits_the_terminal_and_is_no_wider_than_can_be_read(
    width: int, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for text in (
        printed(capsys, "train", "--help-all"),
        *(printed(capsys, name, "--help") for name in ("serve", "merge", "chat", "init")),
    ):
        assert max(map(len, text.splitlines())) <= min(width, 100)


def test_flags_of_mlx_lm_beside_the_long_names() -> None:
    short = parsed("train", *RUN, "--adapter", "a", "--lr", "1e-3", "--batch-size", "2")
    long = parsed("train", *RUN, "--adapter-path", "a", "--learning-rate", "1e-3", "--batch-size=2")
    assert short == long and short["adapter_path"] == "a"
    for command in ("eval", "generate"):
        more = ["--data", "d"] if command == "eval" else ["--prompt", "p"]
        assert parsed(command, "--model", "m", "--adapter", "a", *more)["adapter_path"] == "a"


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("train", "--max-length", "--max-seq-length"),
        ("train", "--steps", "--iters"),
        ("train", "--lora-r=8", "--rank"),
        ("train", "--num-train-epochs", "--epochs"),
        ("train", "--gradient-accumulation-steps", "--grad-accumulation-steps"),
        ("train", "--output-dir", "--adapter-path"),
        ("train", "--learning-rat", "--learning-rate"),
        ("plan", "--max-length", "--max-seq-length"),
        ("plan", "--lr", ""),  # `plan` has no learning rate
    ],
)
def test_an_unknown_flag_is_understood_by_its_meaning(command, given, meant, capsys) -> None:
    assert cli.main([command, "--model", "m", given, "3"]) == 2
    said = capsys.readouterr().err
    assert f"{command} does not accept {given}" in said
    assert (f" Did you mean {meant}?" in said) if meant else ("Did you mean" not in said)


def test_words_of_other_trainers_are_no_names_of_ours() -> None:
    fields = TrainConfig.model_fields
    flags = {name for own in fields for name in (flag(own), *FACETS[own].aliases)}
    assert set(CALLED.values()) <= fields.keys() and not CALLED.keys() & fields.keys()
    assert len(flags) == len(fields) + 2  # plus --adapter and --lr


def test_a_key_of_a_file_is_understood_by_its_meaning(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model_dir: m\nadapter_path: a\nlr: 1e-4\n")
    with pytest.raises(InputError) as error:
        load_config(tmp_path / "run.yaml", {})
    assert str(error.value).endswith("line 3: unknown field lr. Did you mean learning_rate?")


@pytest.fixture(params=["bash", "zsh", "fish"])
def completed(request, capsys, tmp_path: Path):
    """Returns a function that completes a command line in a shell that has loaded our completion
    script. The shell's current folder contains the file data.csv."""
    shell = request.param
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("train", "chat", "batch-size", "rank-scaling"):
        assert word in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "_mlx-segtrain").write_text(script)
    (tmp_path / "data.csv").touch()
    ask = {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}[shell]
    return lambda words, wanted: ask(words, tmp_path, wanted)


def in_bash(words: str, place: Path, _: str) -> str:
    given = [*words.split(" ")]
    listed = " ".join(shlex.quote(word) for word in given)
    ask = (
        f"source ./_mlx-segtrain; COMP_WORDS=({listed}); COMP_CWORD={len(given) - 1}; "
        "$(complete -p mlx-segtrain | sed 's/.*-F //; s/ .*//') mlx-segtrain; "
        'echo "${COMPREPLY[@]}"'
    )
    return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=place).stdout


def in_fish(words: str, place: Path, _: str) -> str:
    ask = f"source ./_mlx-segtrain; complete -C {shlex.quote(words)}"
    how = {"capture_output": True, "text": True, "cwd": place}
    return subprocess.run(
        ["fish", "--no-config", "-c", ask], **how, env={**os.environ, "HOME": str(place)}
    ).stdout


def in_zsh(words: str, place: Path, wanted: str) -> str:
    """Types `words` into a pseudo-terminal, because zsh completes words only in a terminal. Returns
    the output up to `wanted`."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(place)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "COLUMNS": "200"})
    said = b""

    def until(text: bytes) -> None:
        nonlocal said
        end = time.monotonic() + 60
        while text not in said and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                said += os.read(terminal, 1 << 16)

    begin = "fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D; echo rea''dy"
    os.write(terminal, f"{begin}\n".encode())
    until(b"ready")
    said = b""
    os.write(terminal, f"{words}\t\t".encode())
    until(wanted.encode())
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(terminal)
    return said.decode(errors="replace")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("mlx-segtrain exp", "export"),
        ("mlx-segtrain train --lr-s", "--lr-schedule"),
        ("mlx-segtrain train --method d", "dpo"),
        ("mlx-segtrain train --data da", "data.csv"),
    ],
)
def test_a_shell_completes_commands_options_values_and_files(completed, words, wanted) -> None:
    assert wanted in re.findall(r"[\w.-]+", completed(words, wanted))
