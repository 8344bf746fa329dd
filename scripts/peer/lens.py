"""The peer of `mclora bench lens`: the same scores of the same context by the same weights, in PyTorch. One JSON line, with
the same fields.

    mclora bench lens --n 8192 --files DIR
    scripts/peer/lens.py --n 8192 --files DIR

Weights, entries, angles and our scores come from what `--files` left. Before anything is timed the two sides' scores are held
against each other: beyond 2e-5 there is no line. Its best form: SDPA on views, one product for q, k and v, relu² in place, the
span's MLP once for each level instead of once for each entry, no autograd.
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import quiet
import s2

EPS = 1.1920929e-7
CLOSE = 2e-5

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--files", type=Path, required=True, help="folder that `mclora bench lens --files` wrote")
parser.add_argument("--n", type=int, default=8192)
parser.add_argument("--shape", default="768,2,6", help="width, blocks, heads")
parser.add_argument("--causal", action="store_true")
parser.add_argument("--attn", choices=s2.KINDS, default="dense")
parser.add_argument("--group", default="0.25")
parser.add_argument("--dtype", choices=["f32"], default="f32")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--reps", type=int, default=3)
args = parser.parse_args()

torch.set_num_threads(args.threads)
width, layers, heads = quiet.numbers(args.shape)
d = width // heads
group = args.n if args.attn == "dense" else quiet.group_of(args.group, args.n)
with safe_open(args.files / "lensnet.safetensors", "pt") as file:
    config = json.loads(file.metadata()["config"])
w = load_file(args.files / "lensnet.safetensors")
context = load_file(args.files / "context.safetensors")
found = {
    "width": config["width"], "layers": config["layers"], "heads": config["heads"], "causal": config["causal"],
    "group": min(config.get("group", args.n), args.n), "n": len(context["scores"]),
}
wanted = {"width": width, "layers": layers, "heads": heads, "causal": args.causal, "group": group, "n": args.n}
if found != wanted:
    raise SystemExit(f"{args.files}: expected {wanted}, got {found}")

entries, cos, sin = (context[name].reshape(args.n, -1) for name in ("entries", "cos", "sin"))
lod, start = context["lod"].long(), context["start"]
qkv = [
    torch.cat([w.pop(f"blocks.{i}.attn.c_{part}.weight") for part in "qkv"]) for i in range(layers)
]
attention = s2.KINDS[args.attn]


def turned(x):
    """rms over a head of the rotation by -θ; x [n, H, d]."""
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return F.rms_norm(torch.cat([a * c + b * s, b * c - a * s], dim=-1), (d,), eps=EPS)


def mlp(name, x):
    hidden = F.silu(F.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"]))
    return F.linear(hidden, w[f"{name}.2.weight"], w[f"{name}.2.bias"])


@torch.inference_mode()
def scores():
    x = entries
    for i in range(layers):
        q, k, v = (
            part.view(args.n, heads, d)
            for part in F.linear(F.rms_norm(x, (width,), eps=EPS), qkv[i]).chunk(3, dim=-1)
        )
        mixed = attention(turned(q)[None], turned(k)[None], v[None], group, args.causal)
        del q, k, v
        x = x + F.linear(mixed.reshape(args.n, width), w[f"blocks.{i}.attn.c_proj.weight"])
        del mixed
        wide = F.linear(F.rms_norm(x, (width,), eps=EPS), w[f"blocks.{i}.mlp.c_fc.weight"])
        wide = wide.relu_().square_()
        x = x + F.linear(wide, w[f"blocks.{i}.mlp.c_proj.weight"])
        del wide
    spans = torch.tensor([[math.log2(config["block"] ** level) / 10] for level in range(4)])
    of_level = w["level_embed.weight"] + mlp("span_mlp", spans)
    cursor = start[-1] + config["block"] ** lod[-1]
    far = ((cursor - start).double() / max(1, cursor - start[0])).float()
    features = of_level[lod] + mlp("dist_mlp", far[:, None])
    hidden = torch.cat([x, features], dim=1)
    if "scorer.weight" in w:
        u = F.linear(hidden, w["scorer.weight"], w["scorer.bias"])
    else:
        hidden = F.linear(hidden, w["scorer.0.weight"], w["scorer.0.bias"]).relu_()
        u = F.linear(hidden, w["scorer.2.weight"], w["scorer.2.bias"])
    u = u[:, 0].tanh_()
    # What an allocator may not do: a token is not expanded, the highest level not collapsed.
    return torch.where(lod == 0, u.clamp(max=0), torch.where(lod >= 2, u.clamp(min=0), u))


# What libraries keep for themselves is made in the warm-up and does not count: only this work's own memory does.
warm_up = quiet.timed(scores)
apart = (scores() - context["scores"]).abs().max().item()
if not apart <= CLOSE:
    raise SystemExit(f"expected scores within {CLOSE} of ours, got {apart}")
idle = quiet.start_of_memory()
scores()
extra = quiet.status("VmHWM") - idle
median, best, clean, other = quiet.sample(scores, args.reps, 3 * args.reps, warm_up)
pairs = s2.forward_flops(args.attn, args.n, heads, d, group) * (1 if args.causal else 2)
middle = max(width, 128)
head = 2 * width if config["head"] == "linear" else middle * (2 * width + 1)
flops = layers * (24 * args.n * width**2 + pairs) + 2 * args.n * (2 * width * (width + 1) + head)
quiet.tell(
    lib="torch", version=torch.__version__, what="lens", dtype=args.dtype, threads=args.threads, shape=args.shape,
    attn=args.attn, causal=args.causal, B=1, n=args.n, G=group,
    fwd_ms=round(median * 1e3, 3), best_ms=round(best * 1e3, 3), peak_extra_MB=round(extra / 1e6, 1),
    gflops=round(flops / median / 1e9, 1), gflop_total=round(flops / 1e9, 3), apart=apart, n_clean=clean, other=other,
)
