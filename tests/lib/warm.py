"""Processes from which runs are forked import this module, because it imports everything that a run
needs.

It computes nothing, because MLX's threads do not exist in a fork. The variable WARM_MODEL is the
folder of a model.
"""

import os

from mlx_segtrain.torchless import hide_torch

hide_torch()

import numpy.random  # noqa: E402
from mlx_lm.models import llama, switch_layers  # noqa: E402

from mlx_segtrain import training  # noqa: E402
from mlx_segtrain.models import gemma, generic, load_tokenizer  # noqa: E402

assert numpy.random and llama and switch_layers and training and gemma and generic
load_tokenizer(os.environ["WARM_MODEL"])
