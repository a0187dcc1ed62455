"""The mapping from config.json and checkpoint names to the decoder, in the terms that all families share."""
