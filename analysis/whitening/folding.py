"""A whitening folded into the weights of a linear coder: an autoencoder of whitened rows becomes one of raw rows.

Source: arXiv 2511.13981 (whitening before a sparse autoencoder); the names and shapes are those of SAELens.
Axis letters: D width of a row, K width of a whitened row, F features.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from analysis.whitening.whitening import Whitening


class CoderWeights(NamedTuple):
    """features = act(x @ W_enc + b_enc), of x - b_dec where it is subtracted; restored = features @ W_dec + b_dec.

    The activation function may be any that sees features alone (ReLU, JumpReLU, TopK without decoder norms).
    """

    W_enc: Float[np.ndarray, "K F"]
    b_enc: Float[np.ndarray, "F"]
    W_dec: Float[np.ndarray, "F K"]
    b_dec: Float[np.ndarray, "K"]


def fold_whitening(whitening: Whitening, weights: CoderWeights, *, subtracts_b_dec: bool) -> CoderWeights:
    """The coder of raw rows with the features of `weights` on whitened ones, whose output is inverted; K becomes D.

    subtracts_b_dec: whether the encoder sees x - b_dec (SAELens: `apply_b_dec_to_input`), before and after folding.
    Computed in float64, returned in the dtype of the weights. The rows of W_dec are no longer of unit length.
    """
    exact = CoderWeights(*(np.asarray(array, np.float64) for array in weights))
    encoder = whitening.transform @ exact.W_enc
    decoder_bias = exact.b_dec @ whitening.inverse + whitening.mean
    if subtracts_b_dec:
        # (x - decoder_bias) @ transform differs from z - b_dec by what of b_dec lies in no kept direction.
        dropped = exact.b_dec - exact.b_dec @ whitening.inverse @ whitening.transform
        encoder_bias = exact.b_enc - dropped @ exact.W_enc
    else:
        encoder_bias = exact.b_enc - whitening.mean @ encoder
    folded = (encoder, encoder_bias, exact.W_dec @ whitening.inverse, decoder_bias)
    return CoderWeights(*(new.astype(old.dtype) for new, old in zip(folded, weights, strict=True)))
