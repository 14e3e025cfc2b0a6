"""Model families: configuration, RoPE, weights and tokenizers, and the decoder built from them."""
