"""Codes, the generator, the encoder, and the files of tensors that hold them."""
