"""How fast the job is, against its own forward passes and against a peer. See README.md."""
