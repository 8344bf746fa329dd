"""Do PEFT and transformers compute the logits that we compute?

    mclora logits --base BASE --adapter ADAPTER --tokens tokens.json --out ours.safetensors
    python peft_parity.py --base BASE --adapter ADAPTER --tokens tokens.json --logits ours.safetensors

loads BASE with transformers and ADAPTER with PeftModel.from_pretrained. PEFT stores no RoPE scaling, so it is taken
from our `megacontext` key in adapter_config.json. Without --adapter the base alone is compared, with --merged DIR a
merged folder (plain transformers, scaling from its own config.json), alone or after the adapter. Exit code 0 if every
difference is at most --tolerance, else 1.
"""

import argparse
import json
import os

import parity
import peft
import torch
import transformers
from peft import PeftModel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="model folder")
    parser.add_argument("--adapter", help="adapter folder for --base")
    parser.add_argument("--merged", help="merged model folder")
    parser.add_argument("--tokens", required=True, help="JSON list of token ids, or of equally long lists")
    parser.add_argument("--logits", required=True, help="safetensors file with our `logits`")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    if not (arguments.base or arguments.merged):
        parser.error("one of --base and --merged is needed")
    if arguments.adapter and not arguments.base:
        parser.error("--adapter needs --base")

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    tokens = parity.read_tokens(arguments.tokens)
    ours = parity.read_logits(arguments.logits)
    if arguments.base:
        if arguments.adapter:
            with open(os.path.join(arguments.adapter, "adapter_config.json"), encoding="utf-8") as file:
                own = json.load(file).get("megacontext")
            scaling = own["rope_scaling"] if own else "keep"
            print(f"RoPE scaling: {scaling}")
            config = parity.read_config(arguments.base, scaling, own and own["context_length"])
            model = PeftModel.from_pretrained(parity.load_model(arguments.base, config), arguments.adapter).eval()
            parity.compare(model, tokens, ours, arguments.tolerance, "base + adapter")
        else:
            model = parity.load_model(arguments.base, parity.read_config(arguments.base))
            parity.compare(model, tokens, ours, arguments.tolerance, "base")
    if arguments.merged:
        model = parity.load_model(arguments.merged, parity.read_config(arguments.merged))
        parity.compare(model, tokens, ours, arguments.tolerance, "merged")


if __name__ == "__main__":
    main()
