"""One run: flags, checks, the stages of the extraction, and the summary."""
