"""Imports everything that a run or a server needs, in the process from which runs are forked.

This module computes nothing, because MLX's threads do not survive a fork. The environment variable
WARM_MODEL contains the path of a model's folder.
"""

import os

from mlx_segtrain.torchless import hide_torch

hide_torch()

import numpy.random  # noqa: E402
from matplotlib import figure  # noqa: E402
from mlx_lm.models import llama, switch_layers  # noqa: E402

from mlx_segtrain import training  # noqa: E402
from mlx_segtrain.models import gemma, generic, load_tokenizer  # noqa: E402
from mlx_segtrain.serving import app  # noqa: E402

assert numpy.random and figure and llama and switch_layers and training and gemma and generic
assert app
load_tokenizer(os.environ["WARM_MODEL"])
