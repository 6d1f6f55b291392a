"""Our own processes do without torch, where it is installed."""

import os
import subprocess
import sys

FAKE = "print('torch was imported')\n__version__ = '9.9.9'\n"


def test_a_command_does_not_import_torch(llama, data, tmp_path):
    """transformers does, as soon as it finds one: what is in the way here would say so."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(FAKE)
    folders = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", "inspect", data]
    done = subprocess.run(
        [*command, "--model", llama],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "24 to train" in done.stdout and "torch was imported" not in done.stdout
