"""Writes the golden Llama folders under ../fixtures/llama.

Each folder is a small random model in Hugging Face form plus `expected.safetensors`:
`tokens` [B, T] i64, `logits` [B, T, V] f32, `loss` [] f32 (mean next-token cross-entropy over all B*(T-1)
targets, in nats) and `grad.<name>` f32, the gradient of that loss for a few weights. They are computed by
transformers in f32 with eager attention; bf16 and f16 weights are widened to f32 first, which is exact.

`tied_f32_peft/` is an adapter written by PEFT for `tied_f32/`, with `expected.safetensors` {tokens, logits}
of the adapted model.

    python make_tiny_llama.py            # rewrites the fixtures
    python make_tiny_llama.py --out DIR
"""

import argparse
import json
import os
import pathlib
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 32, 48, 2, 4, 2
GRADIENTS = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def make_model(tied, seed, rope=None):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


def golden(model, length, seed):
    model = model.float().eval()
    tokens = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    model.zero_grad()
    loss.backward()
    tensors = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach()}
    parameters = dict(model.named_parameters())
    for name in GRADIENTS:
        if name in parameters:
            tensors[f"grad.{name}"] = parameters[name].grad.clone()
    return tensors


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write(folder, model, dtype, length, seed, shard_size="1GB", old_rope=None):
    fresh(folder)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("transformers_version", None)
    if old_rope:
        theta = config.pop("rope_parameters")["rope_theta"]
        config.pop("head_dim", None)
        config["torch_dtype"] = config.pop("dtype")
        config["rope_theta"] = theta
        config["rope_scaling"] = old_rope
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    reloaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    save_file(golden(reloaded, length, seed), folder / "expected.safetensors")


def write_peft(folder, base):
    fresh(folder)
    torch.manual_seed(5)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    description = json.loads(path.read_text())
    description["base_model_name_or_path"] = base.name
    description["target_modules"].sort()
    path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "fixtures" / "llama")
    out = parser.parse_args().out
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    write(out / "tied_f32", make_model(True, 1), torch.float32, 24, 1)
    write(out / "untied_bf16_sharded", make_model(False, 2), torch.bfloat16, 17, 2, shard_size="20KB")
    write(out / "untied_f32_linear", make_model(False, 3, linear), torch.float32, 40, 3)
    write(
        out / "tied_f16_linear_old_keys",
        make_model(True, 4, {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
        torch.float16,
        33,
        4,
        old_rope={"type": "linear", "factor": 2.0},
    )
    write_peft(out / "tied_f32_peft", out / "tied_f32")
    total = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {total} bytes")


if __name__ == "__main__":
    main()
