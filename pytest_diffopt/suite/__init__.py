"""The recipes that a library's CI runs against its own nightly build: ``pytest --pyargs pytest_diffopt.suite``."""
