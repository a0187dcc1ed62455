"""From stream records to windows of tokenized samples."""
