"""What the fast families' models and the planner of their memory must agree on. Imports nothing."""

#: Rows that an MLP takes at a time. At more tokens what is inside one stops growing, and its first
#: product runs twice where everything is kept. The same for every plan, as sums over rows are.
MLP_ROWS = 16384
#: A chain that trims begins at a multiple of it: few distinct shapes, and whole tiles.
TRIM_MULTIPLE = 64
#: Widths of batches of several rows are multiples of it, so that few kernels are compiled.
PAD_MULTIPLE = 32
#: Boundary values the head reads.
HEAD_READS = ("h", "rows", "targets", "weights")


def padded(width: int, batch_size: int) -> int:
    """The width of a batch whose longest row has `width` tokens."""
    return width if batch_size == 1 else -(-width // PAD_MULTIPLE) * PAD_MULTIPLE


def trim_start(first: int) -> int:
    """The position from which a chain that trims runs, if the first one with a loss is `first`."""
    return first // TRIM_MULTIPLE * TRIM_MULTIPLE


def kv_names(layer: str) -> list[str]:
    """Boundary values that hold the keys and values of a layer."""
    return [f"keys of {layer}", f"values of {layer}"]
