"""Copies golden cases of GistNet and LensNet from a folder into the fixtures, without what no test reads.

`bf16.*` tensors repeat `fp32.*` with tables rounded to bf16, as the original rounds them; this project matches `fp32.*`.

    python trim_megacontext_golden.py SOURCE_FOLDER ../fixtures/megacontext
"""

import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

source, target = map(Path, sys.argv[1:])
for pattern in ("gist_*.safetensors", "lens_*.safetensors", "pref_loss.safetensors"):
    for path in sorted(source.glob(pattern)):
        with safe_open(path, "numpy") as case:
            kept = [name for name in case.keys() if not name.startswith("bf16.")]
            save_file({name: case.get_tensor(name) for name in kept}, target / path.name)
