"""`make mac` checks on Linux that the package would build on a Mac. See docs/metal_on_linux.md."""
