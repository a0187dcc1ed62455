"""One call of the compiled program: its layout, its backends, and what is fetched of it."""
