"""Rotary frequencies as transformers computes them, and exact angles far out.

Writes integration-tests/fixtures/rope/transformers.json: for configurations of every scaling, the keys as a config.json of
each version states them, and inv_freq with attention_scaling at several sequence lengths, taken from
transformers.modeling_rope_utils (f32 there). And exact_angles.json: cosines and sines of position * frequency in 60 digits
(mpmath), of the plain frequencies.

    python make_rope_golden.py ../fixtures/rope
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from mpmath import mp, mpf
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HEAD = 16
SHORT = [1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75]
LONG = [1.0, 1.3, 2.0, 3.5, 6.0, 9.0, 14.0, 16.5]
CASES = {
    "plain": (10000.0, 64, None),
    "linear": (10000.0, 64, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (10000.0, 64, {"rope_type": "dynamic", "factor": 2.5}),
    "dynamic_factor_1": (500000.0, 64, {"rope_type": "dynamic", "factor": 1.0}),
    "yarn": (10000.0, 512, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}),
    "yarn_mscale": (
        10000.0,
        2560,
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64,
            "mscale": 0.707, "mscale_all_dim": 1.3, "beta_fast": 16.0, "beta_slow": 2.0,
        },
    ),
    "yarn_untruncated": (
        150000.0,
        131072,
        {
            "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
            "truncate": False, "attention_factor": 1.5,
        },
    ),
    "yarn_without_original": (1000000.0, 4096, {"rope_type": "yarn", "factor": 4.0}),
    "longrope": (
        10000.0,
        512,
        {
            "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
            "original_max_position_embeddings": 64,
        },
    ),
    "longrope_factor": (
        10000.0,
        512,
        {
            "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
            "original_max_position_embeddings": 64, "factor": 16.0,
        },
    ),
    "llama3": (
        500000.0,
        131072,
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}
LENGTHS = [1, 48, 64, 65, 200, 512, 5000]


def config(theta, longest, scaling, old):
    keys = dict(hidden_size=2 * HEAD, num_attention_heads=2, head_dim=HEAD, max_position_embeddings=longest)
    if old:
        return dict(keys, rope_theta=theta, rope_scaling=scaling)
    return dict(keys, rope_parameters=dict(scaling or {"rope_type": "default"}, rope_theta=theta))


def frequencies(keys, length):
    made = LlamaConfig(**json.loads(json.dumps(keys)))
    kind = made.rope_parameters["rope_type"]
    if kind == "default":
        theta = made.rope_parameters["rope_theta"]
        return 1.0 / (theta ** (torch.arange(0, HEAD, 2, dtype=torch.int64).float() / HEAD)), 1.0
    return ROPE_INIT_FUNCTIONS[kind](made, torch.device("cpu"), seq_len=length)


def main(out):
    cases = []
    for name, (theta, longest, scaling) in CASES.items():
        new, old = (config(theta, longest, scaling, old) for old in (False, True))
        at = []
        for length in LENGTHS:
            inv_freq, attention = frequencies(new, length)
            again, attention_old = frequencies(old, length)
            assert torch.equal(inv_freq, again) and attention == attention_old, name
            at.append({"length": length, "inv_freq": inv_freq.tolist(), "attention_scaling": float(attention)})
        cases.append({"name": name, "new": new, "old": old, "at": at})
    write(out / "transformers.json", {"transformers": transformers.__version__, "head_dim": HEAD, "cases": cases})

    mp.dps = 60
    angles = []
    for theta, width in ((10000, 128), (500000, 16)):
        for position in ("100000000", "99999999", "12345678.5", "1"):
            bands = [mpf(position) * mpf(theta) ** (-mpf(2 * i) / width) for i in range(0, width // 2, width // 16)]
            angles.append({
                "theta": float(theta), "width": width, "position": float(position), "every": width // 16,
                "cos": [float(mp.cos(a)) for a in bands], "sin": [float(mp.sin(a)) for a in bands],
            })
    write(out / "exact_angles.json", angles)


def write(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
