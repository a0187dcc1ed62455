"""One call of the compiled program: its layout, its backends, and the fetched part of its output."""
