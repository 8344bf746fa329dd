"""Comparisons with transformers, PEFT and gguf that train something first, and so are no tests: run them by hand.

    python compare_by_hand.py --mclora ../../target/release/mclora merged      # merged folders of every scaling
    python compare_by_hand.py --mclora ../../target/release/mclora adapters    # our adapters of every kind, in PEFT
    python compare_by_hand.py --mclora ../../target/release/mclora neox        # GPT-NeoX with its head, in PEFT
    python compare_by_hand.py --mclora ../../target/release/mclora gguf        # an adapter as GGUF, read by gguf
    python compare_by_hand.py --mclora ../../target/release/mclora all

Models are random and tiny, made by transformers with a tokenizer of words; `mclora extend` trains each adapter for a few
steps. One line for each comparison with the largest difference of logits (of values, for gguf); exit code 1 where one is
above --tolerance. Needs the packages of requirements.txt, and for `gguf` the package of that name.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

VOCAB, ORIGINAL, CONTEXT = 96, 32, 128
HALF = 8  # Bands of a head.
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * HALF,
    "long_factor": [1.0 + 0.6 * band for band in range(HALF)],
}
SCALINGS = ["linear", "ntk", "dynamic", "yarn", "llama3", json.dumps(LONGROPE)]
KINDS = {
    "plain": [],
    "rslora": ["--rslora"],
    "dora": ["--dora", "--target-modules", "all-linear"],
    "pissa": ["--init", "pissa", "--target-modules", "q_proj,up_proj"],
    "embeddings": ["--embeddings", "lora"],
    "embeddings, tied": ["--embeddings", "lora"],
    "embeddings in full": ["--embeddings", "full"],
    "head": ["--target-modules", "q_proj,lm_head"],
    "rows of tokens": ["--embeddings", "new-tokens", "--new-tokens", "3,17,60"],
    "rows of tokens, tied": ["--embeddings", "new-tokens", "--new-tokens", "3,17,60"],
    "norms": ["--embeddings", "frozen"],
    "patterns": ["--rank-pattern", "q_proj=2", "--rank-pattern", "[a-z]+_proj=3", "--alpha-pattern", "o_proj=5"],
    "an expression": ["--target-modules", r".*\.1\..*(?<!k)_proj", "--embeddings", "frozen"],
    "all but some": ["--target-modules", "all-linear", "--exclude-modules", "down_proj,k_proj"],
    "the last block": ["--layers", "last:1"],
}


class Bench:
    """A folder for models and runs, and the program."""

    def __init__(self, folder, arguments):
        self.folder = pathlib.Path(folder)
        self.mclora = str(arguments.mclora.resolve())
        self.tolerance = arguments.tolerance
        self.good = True
        words = random.Random(7)
        # Words that come back after a few others: something to learn.
        text = [words.randrange(1, VOCAB) for _ in range(40)]
        while len(text) < 12000:
            text.append(text[-words.choice([7, 7, 7, 23])] if words.random() < 0.8 else words.randrange(1, VOCAB))
        (self.folder / "text.txt").write_text(" ".join(f"w{word}" for word in text))
        # Shorter than what is extended to, so that `dynamic` is not `ntk` there.
        self.tokens = torch.tensor([[text[row * 500 + i] for i in range(CONTEXT * 3 // 4)] for row in range(2)])
        (self.folder / "tokens.json").write_text(json.dumps(self.tokens.tolist()))

    def run(self, *arguments):
        done = subprocess.run([self.mclora, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"mclora {' '.join(map(str, arguments))}\n{done.stderr}")

    def model(self, name, model):
        """Saves a model with a tokenizer of words beside it."""
        folder = self.folder / name
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(VOCAB)}, "unk_token": "w0"},
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return folder

    def llama(self, name, tied):
        torch.manual_seed(len(name))
        sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=ORIGINAL)
        ends = dict(tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)
        return self.model(name, LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends)))

    def neox(self, name):
        torch.manual_seed(3)
        sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
        rest = dict(num_attention_heads=4, max_position_embeddings=ORIGINAL, bos_token_id=0, eos_token_id=0)
        return self.model(name, GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **rest)))

    def extend(self, base, run, *flags):
        """A few steps; the adapter's folder."""
        out = self.folder / run
        self.run(
            *("extend", "--base", base, "--data", self.folder / "text.txt", "--out", out, "--context", CONTEXT),
            *("--stages", f"{CONTEXT}:12", "--tokens-per-step", 512, "--lr", "1e-2", "--warmup", 2, "--rank", 4),
            *("--eval-tokens", 256, "--seed", 5, *flags),
        )
        return out / "adapter"

    def logits(self, base, *flags):
        out = self.folder / "logits.safetensors"
        self.run("logits", "--base", base, "--tokens", self.folder / "tokens.json", "--out", out, *flags)
        return load_file(out)["logits"]

    def merge(self, base, adapter, name):
        out = self.folder / name
        self.run("merge", "--base", base, "--adapter", adapter, "--out", out)
        return out

    def compare(self, what, ours, theirs, before=None):
        """Prints the largest difference; `before` is what both would be without what is compared."""
        assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
        difference = (ours - theirs).abs().max().item()
        good = difference <= self.tolerance
        moved = "" if before is None else f", moved by up to {(theirs - before).abs().max().item():.2f}"
        if before is not None and not (theirs - before).abs().max().item() > 100 * self.tolerance:
            good = False
        self.good &= good
        size = theirs.abs().max().item()
        print(f"{what:32} {difference:.2e}  values up to {size:.2f}{moved}{'' if good else '  TOO LARGE, OR NOT MOVED'}")


def load(folder, config=None):
    """The model in f32 with plain attention, as transformers reads the folder."""
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager", dtype=torch.float32
    ).eval()


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens).logits.float()


def with_and_without(model, tokens):
    """Logits of a model with PEFT's adapter, and of the same model with the adapter switched off."""
    with_adapter = logits_of(model, tokens)
    with model.disable_adapter():
        return with_adapter, logits_of(model, tokens)


def adapted(base, adapter):
    """The base with the positions that the adapter was trained for, and the adapter by PEFT."""
    from peft import PeftModel

    config = transformers.AutoConfig.from_pretrained(base)
    own = json.loads((adapter / "adapter_config.json").read_text())["megacontext"]
    scaling = own["rope_scaling"]
    config.rope_parameters = {**(config.rope_parameters or {}), **scaling}
    config.rope_parameters["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
    return PeftModel.from_pretrained(load(base, config), adapter).eval()


def rename(adapter, old, new, folder):
    """A copy of an adapter for a module of another name."""
    folder.mkdir()
    config = (adapter / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace(f'"{old}"', f'"{new}"'))
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(f".{old}.", f".{new}."): values for name, values in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")


def merged(bench):
    for tied in [True, False]:
        base = bench.llama(f"base, {'tied' if tied else 'untied'}", tied)
        before = logits_of(load(base), bench.tokens)
        for scaling in SCALINGS:
            name = "longrope" if scaling.startswith("{") else scaling
            run = f"{base.name}, {name}"
            adapter = bench.extend(base, f"run {run}", "--scaling", scaling)
            folder = bench.merge(base, adapter, f"merged {run}")
            theirs = logits_of(load(folder), bench.tokens)
            bench.compare(run.replace("base", "merged"), bench.logits(folder), theirs, before)
            bench.compare("  the same, by its adapter", bench.logits(base, "--adapter", adapter), theirs)


def adapters(bench):
    bases = {tied: bench.llama(f"adapted {tied}", tied) for tied in [True, False]}
    for kind, flags in KINDS.items():
        base = bases["tied" in kind]
        adapter = bench.extend(base, f"run {kind}", *flags, *([] if kind == "norms" else ["--freeze-norms"]))
        theirs, before = with_and_without(adapted(base, adapter), bench.tokens)
        bench.compare(kind, bench.logits(base, "--adapter", adapter), theirs, before)


def neox(bench):
    base = bench.neox("neox")
    for targets in ["embed_out", "query_key_value,embed_out", "all-linear"]:
        adapter = bench.extend(base, f"run neox {targets}", "--target-modules", targets, "--embeddings", "frozen")
        if not hasattr(load(base), "embed_out"):
            # In transformers 5.24 the module is `lm_head`; the tensor of a model's files is `embed_out` all the same.
            rename(adapter, "embed_out", "lm_head", bench.folder / f"renamed {targets}")
        renamed = bench.folder / f"renamed {targets}"
        model = adapted(base, renamed if renamed.exists() else adapter)
        theirs, before = with_and_without(model, bench.tokens)
        bench.compare(f"gpt_neox, {targets}", bench.logits(base, "--adapter", adapter), theirs, before)


def gguf(bench):
    from gguf import GGUFReader

    base = bench.llama("for gguf", False)
    flags = ["--target-modules", "all-linear", "--embeddings", "frozen", "--freeze-norms"]
    adapter = bench.extend(base, "run gguf", *flags)
    out = bench.folder / "adapter.gguf"
    bench.run("export", "--format", "gguf", "--base", base, "--adapter", adapter, "--out", out, "--dtype", "f32")
    reader = GGUFReader(out)

    def text(key):
        field = reader.fields[key]
        return bytes(field.parts[field.data[0]]).decode()

    assert (text("general.type"), text("adapter.type")) == ("adapter", "lora"), sorted(reader.fields)
    read = {t.name: torch.tensor(t.data.reshape(t.shape.tolist()[::-1])) for t in reader.tensors}
    ours = load_file(adapter / "adapter_model.safetensors")
    assert len(read) == len(ours), (len(read), len(ours))
    parts = dict(q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output")
    parts |= dict(gate_proj="ffn_gate", up_proj="ffn_up", down_proj="ffn_down")
    heads = dict(q_proj=4, k_proj=2)
    worst = 0.0
    for name, values in ours.items():
        layer, module, factor = name.split(".")[4], name.split(".")[-3], name.split(".")[-2]
        if factor == "lora_B" and module in heads:
            # llama.cpp pairs neighbours where transformers pairs halves.
            rows = values.reshape(heads[module], 2, -1, values.shape[1])
            values = rows.transpose(1, 2).reshape(values.shape)
        theirs = read[f"blk.{layer}.{parts[module]}.weight.lora_{factor[-1].lower()}"]
        worst = max(worst, (theirs - values).abs().max().item())
    bench.good &= worst == 0.0
    print(f"{'gguf, every factor':32} {worst:.2e}  {len(read)} tensors, architecture {text('general.architecture')}")


def main():
    commands = dict(merged=merged, adapters=adapters, neox=neox, gguf=gguf)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*commands, "all"])
    parser.add_argument("--mclora", type=pathlib.Path, required=True, help="the program, beside its plugin")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, arguments)
        for name, command in commands.items():
            if arguments.command in (name, "all"):
                command(bench)
    sys.exit(0 if bench.good else 1)


if __name__ == "__main__":
    main()
