"""What makes activations smaller before they leave the device."""
