"""The hosts of a pod slice: how they communicate, and how they extract one stream together."""
