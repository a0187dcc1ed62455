"""The fidelity certificate: a comparison of activations with those of transformers in float32."""
