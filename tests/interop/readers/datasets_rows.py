"""OUT KIND PATH COLUMN: what datasets loads of a column. KIND: a packaged loader, `folder`, or `saved`."""

import sys

import datasets
import numpy as np

out, kind, path, column = sys.argv[1:]
if kind == "saved":
    rows = datasets.load_from_disk(path)
elif kind == "folder":
    rows = datasets.load_dataset(path, split="train")
else:
    rows = datasets.load_dataset(kind, data_files=path, split="train")
feature = rows.features[column]
assert isinstance(feature, datasets.Array2D), feature
arrays = rows.select_columns([column]).with_format("numpy", dtype=np.dtype(feature.dtype))
values = [row[column] for row in arrays]
ids = [np.array(row, np.int64) for row in rows["token_ids"]]
np.savez(
    out,
    values=np.concatenate(values),
    lengths=np.array([len(array) for array in values]),
    token_ids=np.concatenate(ids),
    version=np.array(datasets.__version__),
)
