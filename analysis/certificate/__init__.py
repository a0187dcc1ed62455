"""The fidelity certificate: activations beside those of transformers in float32."""
