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


def kv_names(layer: str) -> list[str]:
    """Boundary values that hold the keys and values of a layer."""
    return [f"keys of {layer}", f"values of {layer}"]
