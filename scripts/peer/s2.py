"""Shifted sparse and dense attention in PyTorch, in the fastest form found: SDPA on views.

Same attention as ours, causal unless told otherwise; the first ceil(H/2) query heads see groups of G entries, the others
the same groups moved by G/2, with half groups at both ends; G divides n. Grouped queries are expanded, since SDPA on the CPU
has no other way; with `shared` (on a GPU, where flash attention reads shared heads itself) they are not, unless a kv head
belongs to both halves.
"""
import torch
import torch.nn.functional as F


def widened(x, heads):
    """kv heads repeated for the query heads that share them: [B, n, Hkv, d] to [B, n, H, d]."""
    batch, n, kv_heads, d = x.shape
    if kv_heads == heads:
        return x
    return x.unsqueeze(3).expand(batch, n, kv_heads, heads // kv_heads, d).reshape(batch, n, heads, d)


def attend(q, k, v, causal):
    """SDPA of [B, H, n, d]; told of shared kv heads only where there are some, since not every version knows the word."""
    sharing = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **sharing)


def grouped(q, k, v, group, causal):
    """Attention within consecutive groups; heads stay last but one, so that nothing but views is made."""
    batch, n, heads, d = q.shape
    parts = [x.reshape(-1, group, x.shape[2], d).transpose(1, 2) for x in (q, k, v)]
    mixed = attend(*parts, causal)
    return mixed.transpose(1, 2).reshape(batch, n, heads, d)


def shifted_sparse(q, k, v, group, causal=True, shared=False):
    """q [B, n, H, d], k and v [B, n, Hkv, d] to [B, n, H, d]."""
    n, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if group >= n:
        return dense(q, k, v, group, causal, shared)
    if n % group or group % 2:
        raise ValueError(f"expected an even group that divides n, got G {group}, n {n}")
    plain = (heads + 1) // 2
    if not shared or plain % (heads // kv_heads):
        k, v = widened(k, heads), widened(v, heads)
    # split, not slices: its backward is one concatenation.
    parts = [(x, plain * x.shape[2] // heads) for x in (q, k, v)]
    first, second = zip(*(x.split([some, x.shape[2] - some], dim=2) for x, some in parts))
    out = [grouped(*first, group, causal)]
    if heads > plain:
        half = group // 2
        pieces = zip(*(x.split([half, n - group, half], dim=1) for x in second))
        out.append(torch.cat([grouped(*p, min(group, p[0].shape[1]), causal) for p in pieces], dim=1))
    return torch.cat(out, dim=2)


def dense(q, k, v, group, causal=True, shared=False):
    heads = q.shape[2]
    if not shared:
        k, v = widened(k, heads), widened(v, heads)
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), causal).transpose(1, 2)


KINDS = {"s2": shifted_sparse, "dense": dense}


def forward_flops(kind, n, heads, d, group):
    """As ours count it: two products of d multiply-adds for half the pairs of each group."""
    if kind == "dense" or group >= n:
        return heads * 2 * d * n * n
    plain = (heads + 1) // 2
    groups = n // group
    whole = plain * groups + (heads - plain) * (groups - 1)
    return 2 * d * (whole * group**2 + (heads - plain) * 2 * (group // 2) ** 2)


if __name__ == "__main__":
    # The two halves against a mask, values and gradients, causal and not.
    torch.manual_seed(0)
    n, d, group = 24, 8, 8
    row = torch.arange(n)
    # Five heads of one kv head, which belongs to both halves; six of two, which do not.
    for heads, kv_heads, causal, shared in (
        (5, 1, True, False), (5, 1, False, False), (5, 1, True, True), (6, 2, True, False), (6, 2, True, True)
    ):
        q, k, v = (torch.randn(2, n, h, d, requires_grad=True) for h in (heads, kv_heads, kv_heads))
        mask = torch.empty(heads, n, n, dtype=torch.bool)
        for h in range(heads):
            shift = 0 if h < 3 else group // 2
            own = (row - shift) // group
            mask[h] = (own[:, None] == own[None, :]) & ((row[:, None] >= row[None, :]) | (not causal))
        expected = F.scaled_dot_product_attention(
            q.transpose(1, 2), widened(k, heads).transpose(1, 2), widened(v, heads).transpose(1, 2), attn_mask=mask
        ).transpose(1, 2)
        got = shifted_sparse(q, k, v, group, causal, shared)
        weights = torch.randn_like(got)
        pairs = [(expected, got)]
        pairs += zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (expected, got)))
        worst = max((a - b).abs().max().item() for a, b in pairs)
        how = f"{heads}/{kv_heads} heads, causal: {causal}, shared: {shared}"
        print(f"largest difference from masked attention, values and gradients: {worst:.1e} ({how})")
        assert worst < 1e-4
