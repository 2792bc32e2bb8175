"""Environments that come with the project; docs/guides/environments.md shows each."""
