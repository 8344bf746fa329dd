"""Writes what transformers generates for the golden model folders: ../fixtures/generate/<folder>.safetensors.

Each file is a left-padded batch run by `model.generate` in f32 with eager attention, greedy, with a KV cache:
`tokens` [B, T] i64 and `mask` [B, T] u8 as given (padding with a mask of 0), `new` [B, S] i64 the new tokens (after a
row's end token, -1), `logits` [B, S, V] f32 the logits that each new token was chosen from (0 after the end), `end` [n]
i64 the end tokens. One row of every batch ends early: its end token is one that it does generate.

    python make_generate_golden.py            # rewrites the fixtures
    python make_generate_golden.py --out DIR --folders DIR...
"""

import argparse
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

STEPS = 12
LENGTHS = [9, 30, 1]


def generate(model, tokens, mask, end):
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=STEPS,
        do_sample=False,
        use_cache=True,
        eos_token_id=end or None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, dim=1)


def write(folder, path, seed):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # The rows' lengths are the case here, not what a folder says about ending.
    model.generation_config.eos_token_id = None
    vocab = model.config.get_text_config().vocab_size
    longest = max(LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab, (len(LENGTHS), longest), generator=generator)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        mask[row, longest - length :] = 1
    tokens = tokens * mask
    with torch.no_grad():
        new, logits = generate(model, tokens, mask, [])
        # A token that the first row takes for the first time after some steps.
        taken = new[0].tolist()
        at = next((i for i in range(3, STEPS) if taken[i] not in taken[:i]), STEPS - 1)
        end = [taken[at]]
        new, logits = generate(model, tokens, mask, end)
    new, logits = new.clone(), logits.float().clone()
    for row in range(len(LENGTHS)):
        hits = [i for i, token in enumerate(new[row].tolist()) if token in end]
        if hits:
            new[row, hits[0] + 1 :] = -1
            logits[row, hits[0] + 1 :] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "tokens": tokens,
            "mask": mask.to(torch.uint8),
            "new": new.contiguous(),
            "logits": logits.contiguous(),
            "end": torch.tensor(end),
        },
        path,
    )
    print(f"{path.name}: {path.stat().st_size} bytes, new tokens {new.tolist()}, end {end}")


def main():
    fixtures = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=fixtures / "generate")
    parser.add_argument("--folders", type=pathlib.Path, nargs="*")
    arguments = parser.parse_args()
    folders = arguments.folders or sorted(
        path.parent
        for kind in ["llama", "families"]
        for path in (fixtures / kind).glob("*/config.json")
    )
    for seed, folder in enumerate(folders, start=1):
        write(folder, arguments.out / f"{folder.name}.safetensors", seed)


if __name__ == "__main__":
    main()
