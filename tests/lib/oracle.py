"""Defines the float64 reference of the ops (NumPy, complex-step derivatives) and all error bounds.

The derivative of F is F'(x) = Im F(x + ih) / h. This formula has no subtraction, so any tiny step
works (h = 1e-200). All functions accept complex arguments: they avoid abs and max of values that
depend on x.
"""

import numpy as np

H = 1e-200


def vjp(f, args, dy):
    """Returns d⟨dy, f(args)⟩ / d args for real float64 args, computed entry by entry."""
    grads = []
    for i, x in enumerate(args):
        grad = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            moved = [np.asarray(a, complex) for a in args]
            moved[i][at] += 1j * H
            grad[at] = (f(*moved).imag * dy).sum() / H
        grads.append(grad)
    return grads


# ---- the ops


def visible(t, s, q_start=None, window=None, segments=None):
    start = s - t if q_start is None else q_start
    position, key = start + np.arange(t)[:, None], np.arange(s)[None]
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    if isinstance(segments, list):  # a list of offsets; tokens after the last offset are padding
        ids = np.searchsorted(segments, np.arange(s), side="right")
        ids[ids == len(segments)] = -1
    else:
        ids = np.zeros(s) if segments is None else np.array(segments)
    return seen & (ids[position] == ids[None]) & (ids[position] >= 0)


def softmax(s, seen):
    """Returns the softmax over the last axis. Rows in which every key is masked are 0."""
    top = np.where(seen, s.real, -np.inf).max(-1, keepdims=True)
    p = np.exp(np.where(seen, s - np.where(np.isfinite(top), top, 0), -np.inf))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total)


def attention(q, k, v, *, scale, window=None, segments=None, softcap=None, q_start=None):
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat(share, 1), v.repeat(share, 1)
    s = scale * q @ k.swapaxes(-1, -2)
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    return softmax(s, visible(q.shape[2], k.shape[2], q_start, window, segments)) @ v


def attention_vjp(q, k, v, do, *, scale, window=None, segments=None, softcap=None, q_start=None):
    """dv = pᵀ·do, ds = p·(do·vᵀ − delta) with delta = Σ o·do, dq = scale·ds·k, dk = scale·dsᵀ·q."""
    b, g, _, _ = k.shape
    share = q.shape[1] // g
    kh, vh = k.repeat(share, 1), v.repeat(share, 1)
    s = scale * q @ kh.swapaxes(-1, -2)
    slope = 1.0
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    p = softmax(s, visible(q.shape[2], k.shape[2], q_start, window, segments))
    dp = do @ vh.swapaxes(-1, -2)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True)) * slope

    def group(x):
        return x.reshape(b, g, share, *x.shape[2:]).sum(2)

    return ds @ kh, group(ds.swapaxes(-1, -2) @ q), group(p.swapaxes(-1, -2) @ do)


def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def swiglu_vjp(gate, up, dy):
    """dgate = dy·up·(σ + gate·σ·(1 − σ)), dup = dy·gate·σ"""
    sigma = 1 / (1 + np.exp(-gate))
    return dy * up * sigma * (1 + gate * (1 - sigma)), dy * gate * sigma


def geglu(gate, up):
    return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def geglu_vjp(gate, up, dy):
    """dup = dy·gelu(gate), dgate = dy·up·gelu'(gate)

    gelu'(x) = (1 + t)/2 + x/2·(1 − t²)·k·(1 + 3·0.044715·x²). The kernels write (1 + t)/2 as σ(u),
    u = 2k·(x + 0.044715·x³), and (1 − t²)/2 as 2·σ·(1 − σ).
    """
    t = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * gate**2)
    return dy * up * ((1 + t) / 2 + gate / 2 * (1 - t**2) * slope), dy * gate / 2 * (1 + t)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rms_norm_vjp(x, weight, dy, eps):
    """dx = r·g − x·r³·mean(g·x) with g = dy·weight"""
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    g = dy * weight
    return r * g - x * r**3 * (g * x).mean(-1, keepdims=True)


def rope(x, dims, *, traditional=False, base=None, scale=1.0, offset=0, freqs=None, segments=(0,)):
    if freqs is None:
        freqs = base ** (np.arange(0, dims, 2) / dims)
    position = offset + np.arange(x.shape[2])
    position = position - np.array([max(b for b in segments if b <= t) for t in position])
    angle = position[:, None] * scale / freqs
    c, s = np.cos(angle), np.sin(angle)
    y = x.copy()
    first = np.s_[..., 0:dims:2] if traditional else np.s_[..., : dims // 2]
    second = np.s_[..., 1:dims:2] if traditional else np.s_[..., dims // 2 : dims]
    y[first] = x[first] * c - x[second] * s
    y[second] = x[first] * s + x[second] * c
    return y


def lora_linear(x, w, bias, a, b, scale, mask=1.0):
    """y = x·wᵀ + bias + scale·((x∘mask)·a)·b, where the elements of `mask` are 0 or 1 / (1 −
    dropout)."""
    return x @ w.T + bias + scale * (mask * x) @ a @ b


def lora_linear_vjp(x, w, a, b, scale, dy, mask=1.0):
    """u = scale·dy·bᵀ:  dx = dy·W + (u·aᵀ)', da = x'ᵀ·u, db = (scale·x'·a)ᵀ·dy"""
    u = scale * dy @ b.T
    return dy @ w + mask * (u @ a.T), (mask * x).T @ u, scale * ((mask * x) @ a).T @ dy


def logits(h, w, bias=0.0, softcap=None):
    z = h @ w.T + bias
    return z if softcap is None else softcap * np.tanh(z / softcap)


def log_probs(h, w, targets, bias=0.0, softcap=None):
    z = logits(h, w, bias, softcap)
    top = z.real.max(-1, keepdims=True)
    lse = np.log(np.exp(z - top).sum(-1)) + top[:, 0]
    return np.where(targets < 0, 0, z[np.arange(len(z)), np.maximum(targets, 0)] - lse)


def log_probs_vjp(h, w, targets, d, bias=0.0, softcap=None):
    """dz = d·(onehot − softmax(z))·(1 − (z/c)²), dh = dz·W: the negated gradient of
    cross-entropy"""
    return -cross_entropy_vjp(h, w, targets, d, softcap, bias)


def cross_entropy(h, w, targets, weights, softcap=None, bias=0.0, smoothing=0.0):
    z = logits(h, w, bias, softcap)
    weights = np.where(targets < 0, 0, weights)
    smooth = log_probs(h, w, np.zeros(len(z), int), bias, softcap) - z[:, 0] + z.mean(-1)
    hard = log_probs(h, w, targets, bias, softcap)
    return -(weights * ((1 - smoothing) * hard + smoothing * smooth)).sum()


def cross_entropy_vjp(h, w, targets, weights, softcap=None, bias=0.0, smoothing=0.0):
    """dz = w·(softmax(z) − (1 − ε)·onehot − ε/V)·(1 − (z/c)²), dh = dz·W"""
    z = logits(h, w, bias, softcap)
    slope = 1.0 if softcap is None else 1 - (z / softcap) ** 2
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(z)), np.maximum(targets, 0)] -= 1 - smoothing
    p -= smoothing / z.shape[1]
    return (np.where(targets < 0, 0, weights)[:, None] * p * slope) @ w


# ---- error bounds (all of them are in this file)

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def errors(x, truth):
    """Returns the relative L2 error and the maximum error relative to the maximum value."""
    x, truth = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    assert x.shape == truth.shape, (x.shape, truth.shape)
    assert np.isfinite(x).all()
    norm, top = np.linalg.norm(truth), np.abs(truth).max(initial=0)
    if top < 1e-12:  # the true value is 0, but is computed as a difference of rounded sums
        norm = top = 3
    return np.linalg.norm(x - truth) / (norm or 1), np.abs(x - truth).max(initial=0) / (top or 1)


def assert_no_worse(name, x, reference, truth, dtype):
    """Checks that x has at most twice the error of plain code in the same dtype, in L2 and maximum
    norm.

    A bound on the maximum error alone would accept a bfloat16 gradient that is 1 % wrong. The
    bounds also allow for one rounding, and for float32 errors: lse is a float32 value that scales a
    whole row, and a BLAS sums in an order that depends on the CPU.
    """
    eps = EPS[dtype]
    (l2, top), (ref_l2, ref_top) = errors(x, truth), errors(reference, truth)
    assert l2 <= 2 * ref_l2 + eps / 2, f"{name}: relative L2 {l2:.2e}, plain code {ref_l2:.2e}"
    assert top <= 2 * ref_top + 2 * eps + 4 * EPS["float32"], (
        f"{name}: largest error {top:.2e}, plain code {ref_top:.2e}"
    )


def assert_rounded(name, x, truth, dtype):
    """Checks that the error of plain code is at most that of float32 arithmetic, plus one rounding
    if `dtype` is a half-precision type."""
    l2, _ = errors(x, truth)
    bound = 16 * EPS["float32"] + (EPS[dtype] / 2 if dtype != "float32" else 0)
    assert l2 <= bound, f"{name}: relative L2 {l2:.2e} > {bound:.0e}"


def assert_close(name, x, truth, bound):
    """Checks that the relative L2 error is at most `bound`."""
    l2, _ = errors(x, truth)
    assert l2 <= bound, f"{name}: relative L2 {l2:.2e} > {bound:.0e}"
