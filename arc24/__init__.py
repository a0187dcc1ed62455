"""ARC prompts: grid encoders, prompt versions, and revertible augmentation. Needs only numpy."""
