"""From images to codes, and what is done with codes: blending, editing, directions."""
