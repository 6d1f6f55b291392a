"""Creates a twin of a model for steps of a few tokens on a GPU. The twin has the same weights and
updates, but its linear layers run less Python code and launch fewer kernels. This makes such a step
faster, because its speed is limited by the time that the host needs to launch it."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adapter import KINDS
from .modules import EMBEDDINGS, LoRALinear
from .together import put_together, several

LINEARS = nn.Linear, nn.QuantizedLinear


def twin_of(model: nn.Module) -> Any:
    """Returns the twin of a model, which is used for steps of up to FEW tokens on a GPU. Its
    results are bit-identical to the results of the model, unless our kernels run the linear layers,
    as on CUDA.

    The twin is called like the model. Updates may be put into the model's modules at any time.
    Modules that are added to the model later are missing from its twin.
    """
    modules = [x for _, x in model.named_modules() if type(x) is LoRALinear]
    if not all(module.grouped for module in modules):  # modules were added since the last call
        put_together(modules, model)
    return _twin(model, {})


def _twin(x: Any, known: dict[int, Any]) -> Any:
    if id(x) in known:
        return known[id(x)]
    if type(x) is LoRALinear:
        new = _Linear(x)
    elif isinstance(x, LoRALinear):
        new = x
    elif type(x) in (*LINEARS, *EMBEDDINGS):
        stock = x.as_linear if isinstance(x, EMBEDDINGS) else x
        product = several(x, stock)
        new = x if product is stock else _Frozen(x, product)
    elif isinstance(x, nn.Module):
        new = nn.Module.__new__(type(x))
        vars(new).update(vars(x))
        known[id(x)] = new  # its children may contain it
        for name, own in x.items():
            dict.__setitem__(new, name, _twin(own, known))
            if not isinstance(own, mx.array):  # MLX would look up submodules in slower Python code
                vars(new)[name] = new[name]
    elif isinstance(x, list | tuple):
        new = type(x)(_twin(own, known) for own in x)
    else:
        return x
    known[id(x)] = new
    return new


class _Linear:
    """Replaces a LoRALinear in the twin."""

    __slots__ = ("_made", "_module")

    def __init__(self, module: LoRALinear):
        self._module = module
        self._made: Callable[..., mx.array] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        module = self._module
        if module.together is not None:
            y = module.together.read(module.place, x)
            if y is not None:
                return y
        if module.rows is not None and module.rows.on:
            return module.rows(module, x, self._product(x))
        for kind in KINDS:
            if kind.array in module:
                return module(x)
        y = self._product(x)
        return module.updated(x, y) if "lora_a" in module else y

    def _product(self, x: mx.array) -> mx.array:
        if self._made is None:  # layers that run together never need it
            linear = self._module.linear
            self._made = several(linear, _product(linear))
        return self._made(x)


class _Frozen:
    """Replaces a linear layer without updates, or an embedding that is also the head, in the
    twin."""

    def __init__(self, module: nn.Module, product: Callable[[mx.array], mx.array]):
        self._module, self.as_linear = module, product
        self._run = module if isinstance(module, EMBEDDINGS) else product

    def __call__(self, x: mx.array) -> mx.array:
        return self._run(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _product(linear: Any) -> Callable[[mx.array], mx.array]:
    """Returns a function that computes the linear layer and looks up its arrays only once."""
    if type(linear) is not nn.QuantizedLinear:
        return linear
    multiply, weight, scales = mx.quantized_matmul, linear["weight"], linear["scales"]
    biases, bias = linear.get("biases"), linear.get("bias")
    how = True, linear.group_size, linear.bits, linear.mode
    if bias is None:
        return lambda x: multiply(x, weight, scales, biases, *how)
    return lambda x: multiply(x, weight, scales, biases, *how) + bias
