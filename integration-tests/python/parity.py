"""What the parity scripts share: reading our files and comparing logits."""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


def read_tokens(path):
    """[B, T] i64 from a JSON list of ids or of equally long lists, alone or under "tokens"."""
    with open(path, encoding="utf-8") as file:
        value = json.load(file)
    if isinstance(value, dict):
        value = value["tokens"]
    tokens = torch.tensor(value, dtype=torch.int64)
    return tokens.unsqueeze(0) if tokens.dim() == 1 else tokens


def read_logits(path):
    """[B, T, V] f32 from `logits` of a safetensors file."""
    logits = load_file(path)["logits"].float()
    return logits.unsqueeze(0) if logits.dim() == 2 else logits


def read_config(folder, rope_scaling="keep", context=None):
    """The folder's configuration; `rope_scaling` (old style, or None) replaces its own unless "keep"."""
    if rope_scaling == "keep":
        return LlamaConfig.from_pretrained(folder)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        raw = json.load(file)
    old = raw.pop("rope_parameters", None) or {}
    raw["rope_theta"] = raw.get("rope_theta", old.get("rope_theta", 10000.0))
    raw["rope_scaling"] = rope_scaling
    if context:
        raw["max_position_embeddings"] = context
    return LlamaConfig.from_dict(raw)


def load_model(folder, config):
    """The model in f32 with plain attention, whatever the files are stored in."""
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    return LlamaForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager", **{name: torch.float32}
    ).eval()


@torch.no_grad()
def compare(model, tokens, ours, tolerance, label):
    """Prints the largest difference; leaves the process with 1 where it is too large."""
    theirs = model(tokens).logits.float()
    if theirs.shape != ours.shape:
        print(f"{label}: expected logits {tuple(theirs.shape)}, got {tuple(ours.shape)}")
        sys.exit(1)
    difference = (theirs - ours).abs().max().item()
    good = difference <= tolerance
    print(
        f"{label}: max |difference| {difference:.3e} over {tuple(theirs.shape)}, logits up to "
        f"{theirs.abs().max().item():.2f}, allowed {tolerance:.0e}: {'ok' if good else 'TOO LARGE'}"
    )
    if not good:
        sys.exit(1)
