"""The hosts of a pod slice: how they talk, and how they share one stream."""
