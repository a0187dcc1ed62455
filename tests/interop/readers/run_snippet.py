"""OUT FOLDER LAYER LINE: runs the snippet of docs/exporting.md with this line in FOLDER, at a tiny size."""

import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "tests"))
from doc_snippets import snippet

out, folder, layer, line = sys.argv[1:]
code = snippet("exporting.md", with_line=line).replace('tokens(12, "', f'tokens({layer}, "')
for large, small in (("100_000_000", "1_280"), ("4096", "32"), ("20_000", "1_010"), ('"k": 64', '"k": 2')):
    code = code.replace(large, small)
os.chdir(folder)
names: dict = {}
exec(code, names)
if "sae" in names:
    np.savez(out, decoder=names["sae"].W_dec.detach().numpy(), taken=names["batches"].state_dict()["epoch"])
else:
    import torch

    decoder = torch.load("saes/trainer_0/ae.pt", weights_only=True)["decoder.weight"]
    np.savez(out, decoder=decoder.numpy(), taken=names["batches"].state_dict()["epoch"])
