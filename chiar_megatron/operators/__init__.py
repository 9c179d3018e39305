"""Token operators: the DCT, spectral mixing, attention and RBF mixing, on plain tensors."""
