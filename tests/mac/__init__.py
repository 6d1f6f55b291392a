"""Checks on Linux that the package would build on a Mac: `make mac`. docs/metal_on_linux.md"""
