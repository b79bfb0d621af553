"""Training of the generator and of the encoders. Nothing else in padinv imports it."""
