"""The peer of `mclora bench attention`: forward and backward in PyTorch. One JSON line, with the same fields.

q [B, n, H, d], k and v [B, n, Hkv, d] as a projection leaves them; gradients of all three for a random gradient. With
`--device cuda` on a GPU: flash attention in bf16, memory of the GPU.
"""
import argparse

import torch

import device as devices
import quiet
import s2

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pattern", choices=s2.KINDS, default="s2")
parser.add_argument("--n", type=int, default=8192)
parser.add_argument("--heads", default="9,3", help="query heads, kv heads")
parser.add_argument("--head-dim", type=int, default=64)
parser.add_argument("--group", default="0.25")
parser.add_argument("--dtype", choices=DTYPES, default="f32")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--reps", type=int, default=3)
parser.add_argument("--batch", type=int, default=1)
devices.add_flag(parser)
args = parser.parse_args()

device = devices.chosen(args.device)
on_gpu = device.type == "cuda"
if on_gpu and args.dtype == "bf16":
    devices.flash_alone()
torch.set_num_threads(args.threads)
torch.manual_seed(0)
heads, kv_heads = quiet.numbers(args.heads)
n, d = args.n, args.head_dim
group = n if args.pattern == "dense" else quiet.group_of(args.group, n)
attention = s2.KINDS[args.pattern]


def random(heads):
    return torch.randn(args.batch, n, heads, d, device=device).to(DTYPES[args.dtype])


q, k, v = (random(h).requires_grad_() for h in (heads, kv_heads, kv_heads))
weights = random(heads)


def both():
    q.grad = k.grad = v.grad = None
    attention(q, k, v, group, shared=on_gpu).backward(weights)


def forward():
    with torch.no_grad():
        attention(q, k, v, group, shared=on_gpu)


both, forward = (devices.waited(device, work) for work in (both, forward))
# What libraries keep for themselves is made in the warm-up and does not count: only this work's own memory does.
warm_up = quiet.timed(both)
q.grad = k.grad = v.grad = None
idle = devices.start_of_memory(device)
both()
extra = devices.peak(device) - idle
median, best, clean, other = quiet.sample(both, args.reps, 3 * args.reps, warm_up)
forward()
forward_median = quiet.sample(forward, args.reps, 3 * args.reps, warm_up / 3)[0]
flops = 3.5 * args.batch * s2.forward_flops(args.pattern, n, heads, d, group)
quiet.tell(
    lib="torch", version=torch.__version__, what="attention", dtype=args.dtype, threads=args.threads,
    device=devices.described(device),
    kind=args.pattern, B=args.batch, H=heads, Hkv=kv_heads, d=d, n=n, G=group,
    fb_ms=round(median * 1e3, 3), best_ms=round(best * 1e3, 3), fwd_ms=round(forward_median * 1e3, 3),
    peak_extra_MB=round(extra / 1e6, 1), gflops=round(flops / median / 1e9, 1), gflop_total=round(flops / 1e9, 3),
    n_clean=clean, other=other,
)
