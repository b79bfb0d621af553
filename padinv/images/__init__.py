"""Images: as datasets, and as pictures and figures."""
