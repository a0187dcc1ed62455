"""ARC prompts: grid encoders, prompt versions, and revertible augmentation. Needs numpy and nothing of this project."""
