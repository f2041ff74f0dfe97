"""Recorded observations that a later run is compared with: one file a recipe, in it one entry a device and set of versions."""
