"""The commit protocol: records, the identity of an output, and the local checkpoint."""
