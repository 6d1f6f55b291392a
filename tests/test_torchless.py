"""The package's processes import neither torch nor pandas, even if these are installed."""

import os
import subprocess
import sys

FAKE = "print(__name__, 'was imported')\n__version__ = '9.9.9'\n"


def test_a_command_imports_neither_torch_nor_pandas(llama, data, tmp_path):
    """transformers and Arrow import these packages if they are installed. The fake packages here
    print a line on import."""
    for name in ("torch", "pandas"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(FAKE)
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
    assert "24 to train" in done.stdout and "was imported" not in done.stdout
