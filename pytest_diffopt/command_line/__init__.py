"""``diffopt``, or ``python -m pytest_diffopt``: a module for each command, beside the plugin and without pytest."""
