"""What every part of the project may use: errors, redaction, JSON with a checksum, dtypes, fault points."""
