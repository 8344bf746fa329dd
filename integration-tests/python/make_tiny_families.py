"""Writes the golden folders of families other than Llama under ../fixtures/families.

Each folder is a small random model in Hugging Face form plus `expected.safetensors`, as make_tiny_llama.py describes it:
`tokens` [B, T] i64, `logits` [B, T, V], `loss` [] (mean next-token cross-entropy in nats) and `grad.<name>`, computed by
transformers in f32 with eager attention. Every feature bites: windows are shorter than T, biases are not zero, gains are
not 1, query heads share kv heads, some blocks have no window or no rotation.

    python make_tiny_families.py            # rewrites the fixtures
    python make_tiny_families.py --out DIR
"""

import argparse
import json
import os
import pathlib
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import save_file

VOCAB, WIDTH, INNER, HEADS, KV_HEADS, LENGTH = 48, 32, 40, 4, 2, 17
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_attention_heads=HEADS,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
    attn_implementation="eager",
)


def rope(theta, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


# Folder: configuration class, its settings, storage, bytes in a shard, gradients to keep, what becomes of config.json.
FOLDERS = {
    "llama_bias_f16": (
        "LlamaConfig",
        dict(num_hidden_layers=2, num_key_value_heads=KV_HEADS, attention_bias=True, mlp_bias=True,
             tie_word_embeddings=True, rope_parameters=rope(10000.0)),
        torch.float16, None,
        ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.o_proj.bias", "model.layers.0.mlp.up_proj.bias",
         "model.layers.1.mlp.down_proj.bias", "model.layers.0.input_layernorm.weight"],
        None,
    ),
    "mistral_window_bf16": (
        "MistralConfig",
        dict(num_hidden_layers=2, num_key_value_heads=KV_HEADS, head_dim=16, sliding_window=6, tie_word_embeddings=False,
             rope_parameters=rope(10000.0)),
        torch.bfloat16, None,
        ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight",
         "model.layers.1.input_layernorm.weight"],
        None,
    ),
    "qwen2_f16": (
        "Qwen2Config",
        dict(num_hidden_layers=3, num_key_value_heads=KV_HEADS, use_sliding_window=True, sliding_window=5,
             max_window_layers=1, tie_word_embeddings=True, rope_parameters=rope(1000.0)),
        torch.float16, None,
        ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.k_proj.bias",
         "model.layers.2.self_attn.v_proj.bias", "model.layers.2.self_attn.o_proj.weight", "model.embed_tokens.weight"],
        "old",
    ),
    "qwen3_bf16_sharded": (
        "Qwen3Config",
        dict(num_hidden_layers=2, num_key_value_heads=KV_HEADS, head_dim=16, tie_word_embeddings=False,
             rope_parameters=rope(10000.0)),
        torch.bfloat16, "20KB",
        ["model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight",
         "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"],
        None,
    ),
    "smollm3_bf16": (
        "SmolLM3Config",
        dict(num_hidden_layers=4, num_key_value_heads=KV_HEADS, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True,
             sliding_window=7, tie_word_embeddings=True, rope_parameters=rope(500.0)),
        torch.bfloat16, None,
        ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.3.input_layernorm.weight"],
        None,
    ),
    "gpt_neox_f32": (
        "GPTNeoXConfig",
        dict(num_hidden_layers=2, hidden_act="gelu", use_parallel_residual=True, tie_word_embeddings=False,
             rope_parameters=rope(10000.0, partial_rotary_factor=0.5)),
        torch.float32, None,
        ["gpt_neox.embed_in.weight", "gpt_neox.layers.1.attention.dense.weight",
         "gpt_neox.layers.0.attention.query_key_value.bias", "gpt_neox.layers.1.attention.dense.bias",
         "gpt_neox.layers.0.mlp.dense_h_to_4h.bias", "gpt_neox.layers.1.mlp.dense_4h_to_h.bias",
         "gpt_neox.layers.0.input_layernorm.bias", "gpt_neox.layers.1.post_attention_layernorm.weight",
         "gpt_neox.final_layer_norm.bias", "lm_head.weight"],
        None,
    ),
    "gpt_neox_sequential_f16": (
        "GPTNeoXConfig",
        dict(num_hidden_layers=2, hidden_act="gelu_new", use_parallel_residual=False, tie_word_embeddings=True,
             rope_parameters=rope(500.0, partial_rotary_factor=0.25)),
        torch.float16, None,
        ["gpt_neox.layers.0.attention.query_key_value.weight", "gpt_neox.layers.0.attention.query_key_value.bias",
         "gpt_neox.layers.1.post_attention_layernorm.bias"],
        "old",
    ),
    "gemma3_bf16": (
        "Gemma3TextConfig",
        dict(num_hidden_layers=3, num_key_value_heads=1, head_dim=16, sliding_window=6, query_pre_attn_scalar=24,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"], final_logit_softcapping=5.0,
             rope_parameters={"sliding_attention": rope(100.0),
                              "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
        torch.bfloat16, None,
        ["model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight",
         "model.layers.0.post_attention_layernorm.weight", "model.layers.1.pre_feedforward_layernorm.weight",
         "model.layers.2.post_feedforward_layernorm.weight", "model.layers.0.self_attn.k_proj.weight",
         "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"],
        None,
    ),
    "nanochat_bf16": (
        "NanoChatConfig",
        dict(num_hidden_layers=2, num_key_value_heads=KV_HEADS, tie_word_embeddings=False, rope_parameters=rope(10000.0)),
        torch.bfloat16, None,
        ["model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight", "model.layers.1.self_attn.k_proj.weight"],
        None,
    ),
}


def make_model(kind, settings, seed):
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**COMMON, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    middle = 0.0 if kind.startswith("Gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(middle + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


def golden(model, gradients, seed):
    model = model.float().eval()
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    model.zero_grad()
    loss.backward()
    tensors = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach()}
    parameters = dict(model.named_parameters())
    for name in gradients:
        # transformers 5 calls GPT-NeoX's head by another name than its folders do.
        stored = "embed_out.weight" if name == "lm_head.weight" and "gpt_neox.embed_in.weight" in parameters else name
        tensors[f"grad.{stored}"] = parameters[name].grad.clone()
    return tensors


def write(folder, kind, settings, dtype, shard, gradients, form, seed):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_model(kind, settings, seed).to(dtype).save_pretrained(folder, max_shard_size=shard or "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("transformers_version", None)
    if form == "old":
        # As transformers 4 wrote it.
        rope_parameters = config.pop("rope_parameters")
        config["torch_dtype"] = config.pop("dtype")
        if kind == "GPTNeoXConfig":
            config["rotary_emb_base"] = rope_parameters["rope_theta"]
            config["rotary_pct"] = rope_parameters["partial_rotary_factor"]
        else:
            config["rope_theta"] = rope_parameters["rope_theta"]
            config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    save_file(golden(reloaded, gradients, seed), folder / "expected.safetensors")


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "fixtures" / "families")
    out = parser.parse_args().out
    for seed, (name, (kind, settings, dtype, shard, gradients, form)) in enumerate(FOLDERS.items(), 1):
        write(out / name, kind, settings, dtype, shard, gradients, form, seed)
    for folder in sorted(out.iterdir()):
        print(f"{folder.name}: {sum(p.stat().st_size for p in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
