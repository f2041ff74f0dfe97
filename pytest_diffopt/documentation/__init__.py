"""Runs the code blocks of documentation pages, unmodified, each in a process of its own, and judges the recipes in them."""
