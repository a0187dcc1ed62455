"""Reading weights: where a model lies, its files and formats, and the way of its tensors to the devices."""
