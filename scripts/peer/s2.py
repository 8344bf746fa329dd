"""Shifted sparse and dense attention in PyTorch, in the fastest form found: SDPA on views.

Same attention as ours, causal unless told otherwise; the first ceil(H/2) query heads see groups of G entries, the others
the same groups moved by G/2, with half groups at both ends; G divides n. Grouped queries are expanded, since SDPA on the CPU
has no other way.
"""
import torch
import torch.nn.functional as F


def widened(x, heads):
    """kv heads repeated for the query heads that share them: [B, n, Hkv, d] to [B, n, H, d]."""
    batch, n, kv_heads, d = x.shape
    if kv_heads == heads:
        return x
    return x.unsqueeze(3).expand(batch, n, kv_heads, heads // kv_heads, d).reshape(batch, n, heads, d)


def grouped(q, k, v, group, causal):
    """Attention within consecutive groups; heads stay last but one, so that nothing but views is made."""
    batch, n, heads, d = q.shape
    parts = [x.reshape(-1, group, heads, d).transpose(1, 2) for x in (q, k, v)]
    mixed = F.scaled_dot_product_attention(*parts, is_causal=causal)
    return mixed.transpose(1, 2).reshape(batch, n, heads, d)


def shifted_sparse(q, k, v, group, causal=True):
    """q [B, n, H, d], k and v [B, n, Hkv, d] to [B, n, H, d]."""
    n, heads = q.shape[1], q.shape[2]
    if group >= n:
        return dense(q, k, v, group, causal)
    if n % group or group % 2:
        raise ValueError(f"expected an even group that divides n, got G {group}, n {n}")
    k, v = widened(k, heads), widened(v, heads)
    plain = (heads + 1) // 2
    # split, not slices: its backward is one concatenation.
    first, second = zip(*(x.split([plain, heads - plain], dim=2) for x in (q, k, v)))
    out = [grouped(*first, group, causal)]
    if heads > plain:
        half = group // 2
        pieces = zip(*(x.split([half, n - group, half], dim=1) for x in second))
        out.append(torch.cat([grouped(*p, min(group, p[0].shape[1]), causal) for p in pieces], dim=1))
    return torch.cat(out, dim=2)


def dense(q, k, v, group, causal=True):
    heads = q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, widened(k, heads), widened(v, heads)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


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
    n, heads, kv_heads, d, group = 24, 5, 1, 8, 8
    q, k, v = (torch.randn(2, n, h, d, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    row = torch.arange(n)
    for causal in (True, False):
        mask = torch.empty(heads, n, n, dtype=torch.bool)
        for h in range(heads):
            shift = 0 if h < 3 else group // 2
            own = (row - shift) // group
            mask[h] = (own[:, None] == own[None, :]) & ((row[:, None] >= row[None, :]) | (not causal))
        expected = F.scaled_dot_product_attention(
            q.transpose(1, 2), widened(k, heads).transpose(1, 2), widened(v, heads).transpose(1, 2), attn_mask=mask
        ).transpose(1, 2)
        got = shifted_sparse(q, k, v, group, causal)
        weights = torch.randn_like(got)
        pairs = [(expected, got)]
        pairs += zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (expected, got)))
        worst = max((a - b).abs().max().item() for a, b in pairs)
        print(f"largest difference from masked attention, values and gradients: {worst:.1e} (causal: {causal})")
        assert worst < 1e-4
