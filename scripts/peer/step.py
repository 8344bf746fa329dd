"""The peer of `mclora bench step`: a LoRA step in PyTorch, transformers and PEFT. One JSON line, with the same fields.

A Llama of the given shape with random weights and tied embeddings; LoRA on q, k, v and o; LoRA, embeddings and norms learn;
activation checkpointing; loss over all positions; AdamW and the clearing of gradients are part of the step.

`--loss hf` is the loss that transformers computes, `--loss chunked` goes over 1024 positions at a time and recomputes their
logits; the second wants GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184
to be at its fastest. `--products bf16` is PyTorch's matmul precision "medium": f32 storage, products in bf16.

With `--device cuda` everything lies on a GPU, optimiser included, and bf16 attends by flash attention alone; `peak_device_MB` is
its memory.
"""
import argparse

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import device as devices
import quiet
import s2

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
POSITIONS = 1024

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shape", default="576,30,9,3,1536,49152", help="width,blocks,heads,kv heads,MLP width,vocabulary")
parser.add_argument("--n", type=int, default=4096)
parser.add_argument("--attn", choices=s2.KINDS, default="s2")
parser.add_argument("--group", default="0.25")
parser.add_argument("--dtype", choices=DTYPES, default="f32")
parser.add_argument("--products", choices=["f32", "bf16"], default="f32")
parser.add_argument("--loss", choices=["hf", "chunked"], default="hf")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--no-checkpointing", action="store_true")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--steps", type=int, default=2)
devices.add_flag(parser)
args = parser.parse_args()

device = devices.chosen(args.device)
on_gpu = device.type == "cuda"
if on_gpu and args.dtype == "bf16":
    devices.flash_alone()
torch.set_num_threads(args.threads)
torch.set_float32_matmul_precision("medium" if args.products == "bf16" else "highest")
torch.manual_seed(0)
transformers.logging.set_verbosity_error()
width, layers, heads, kv_heads, inner, vocab = quiet.numbers(args.shape)
n, head_dim = args.n, width // heads
group = n if args.attn == "dense" else quiet.group_of(args.group, n)


def attend(module, query, key, value, attention_mask, **_):
    """What transformers calls for attention: [B, H, n, d] in, [B, n, H, d] out."""
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return s2.KINDS[args.attn](*parts, group, shared=on_gpu).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("bench", attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("bench", lambda *_, **__: None)


def build():
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=max(8192, n),
        rope_theta=100_000.0, use_cache=False, attn_implementation="bench",
    )
    with device:
        base = LlamaForCausalLM(config).to(DTYPES[args.dtype])
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
    )
    # LoRA in the model's dtype: its fastest form.
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "embed" in name or "norm" in name:
            parameter.requires_grad_(True)
    if not args.no_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).train()


def flops():
    """As ours count it: multiply-adds twice, a frozen weight's forward and input gradient, recomputation."""
    again = 0 if args.no_checkpointing else 1
    kv_width = head_dim * kv_heads
    linear = layers * 2 * (width * (2 * width + 2 * kv_width) + 3 * width * inner) * n * (2 + again)
    lora = layers * 2 * args.rank * (4 * width + 2 * (width + kv_width)) * n * (3 + again)
    attention = layers * s2.forward_flops(args.attn, n, heads, head_dim, group) * (3.5 + again)
    head = 2 * width * vocab * n * 3
    return {key: value * args.batch for key, value in
            dict(linear=linear, lora=lora, lm_head=head, attn=attention).items()}


model = build()
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0,
    fused=on_gpu or None,
)
ids = torch.randint(0, vocab, (args.batch, n), device=device)


def some(hidden, targets, weight):
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def chunked_loss():
    base = model.get_base_model()
    hidden, targets = base.model(input_ids=ids).last_hidden_state[:, :-1], ids[:, 1:]
    sums = [
        checkpoint(some, hidden[:, i:i + POSITIONS], targets[:, i:i + POSITIONS], base.lm_head.weight,
                   use_reentrant=False)
        for i in range(0, n - 1, POSITIONS)
    ]
    return sum(sums) / targets.numel()


losses = []


def step():
    loss = chunked_loss() if args.loss == "chunked" else model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())


step = devices.waited(device, step)
warm_up = quiet.timed(step)
idle = quiet.start_of_memory()
if on_gpu:
    devices.start_of_memory(device)
median, best, clean, other = quiet.sample(step, args.steps, 3 * args.steps, warm_up)
of_gpu = {"peak_device_MB": round(devices.peak(device) / 1e6, 1)} if on_gpu else {}
parts = flops()
total = sum(parts.values())
quiet.tell(
    lib="torch", version=torch.__version__, transformers=transformers.__version__, what="lora_step",
    dtype="mixed" if args.products == "bf16" and args.dtype == "f32" else args.dtype, loss_mode=args.loss,
    device=devices.described(device), threads=args.threads, shape=args.shape, attn=args.attn, B=args.batch, n=n, G=group,
    r=args.rank,
    ckpt=not args.no_checkpointing, step_s=round(median, 4), best_s=round(best, 4),
    tok_s=round(args.batch * n / median, 1), peak_rss_MB=round(quiet.status("VmHWM") / 1e6, 1),
    idle_rss_MB=round(idle / 1e6, 1), tflop=round(total / 1e12, 6),
    tflop_parts={key: round(value / 1e12, 6) for key, value in parts.items()},
    gflops=round(total / median / 1e9, 1), loss=round(losses[0], 4), n_clean=clean, other=other,
    **of_gpu,
)
