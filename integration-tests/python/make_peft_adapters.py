"""Writes adapters of every kind that PEFT makes under ../fixtures/peft, for the folders of ../fixtures/llama.

Each folder is what `save_pretrained` wrote, with random values that are not zero, and `expected.safetensors`: `tokens`
[B, T] i64 and the adapted model's `logits` [B, T, V] f32, computed by PEFT in f32 with eager attention. `base` in
adapter_config.json's `base_model_name_or_path` is the folder's name under ../fixtures/llama.

    python make_peft_adapters.py            # rewrites the fixtures
    python make_peft_adapters.py --out DIR
"""

import argparse
import json
import os
import pathlib
import shutil
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

TIED, UNTIED = "tied_f32", "untied_f32_linear"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "patterns_layers": (
        UNTIED,
        dict(
            target_modules=ATTENTION,
            layers_to_transform=[1],
            layers_pattern="layers",
            rank_pattern={"q_proj": 3, "model.layers.1.self_attn.v_proj": 1},
            alpha_pattern={".*k_proj": 5},
        ),
    ),
    "expression_rslora": (UNTIED, dict(target_modules=r".*\.0\..*(?<!k)_proj", use_rslora=True)),
    "all_linear_excluded": (UNTIED, dict(target_modules="all-linear", exclude_modules=["down_proj", "k_proj"], r=1)),
    "dora": (UNTIED, dict(target_modules=["q_proj", "o_proj", "down_proj"], use_dora=True)),
    "mlp_and_head": (UNTIED, dict(target_modules=["gate_proj", "lm_head"])),
    "embeddings": (UNTIED, dict(target_modules=["embed_tokens", "v_proj"])),
    "embeddings_tied": (TIED, dict(target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True)),
    "tokens_tied": (TIED, dict(target_modules=["q_proj"], trainable_token_indices=[60, 3, 17])),
    "tokens_untied": (
        UNTIED,
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [60, 3], "lm_head": [3, 9]}),
    ),
    "saved_modules": (UNTIED, dict(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])),
    "pissa": (UNTIED, dict(target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")),
}


def write(folder, base_folder, name, base, settings):
    torch.manual_seed(sum(map(ord, name)))
    model = LlamaForCausalLM.from_pretrained(base_folder / base, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(model, config)
    save = dict(save_embedding_layers="auto" if name == "embeddings" else False)
    with tempfile.TemporaryDirectory() as initial:
        if name == "pissa":
            # PEFT's own conversion to plain LoRA needs the first values.
            start = pathlib.Path(initial) / "start"
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(start)
            model.peft_config["default"].init_lora_weights = "pissa"
            save["path_initial_model_for_weight_conversion"] = str(start)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(7))
        tokens[0, :6] = torch.tensor([60, 3, 17, 60, 9, 3])
        with torch.no_grad():
            logits = model(tokens).logits
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, **save)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    description = json.loads(path.read_text())
    description["base_model_name_or_path"] = base
    if isinstance(description["target_modules"], list):
        description["target_modules"].sort()
    path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")


def main():
    warnings.filterwarnings("ignore")
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "fixtures" / "peft")
    out = parser.parse_args().out
    for name, (base, settings) in KINDS.items():
        write(out / name, here.parent / "fixtures" / "llama", name, base, settings)
        size = sum(p.stat().st_size for p in (out / name).rglob("*") if p.is_file())
        print(f"{name}: {size} bytes")


if __name__ == "__main__":
    main()
