"""Photographs: the faces in them, and a run over many."""
