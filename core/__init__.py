"""The extraction engine: streams in, committed activation shards out."""
