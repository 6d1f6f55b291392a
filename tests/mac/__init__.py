"""What Linux can say of a Mac: `make mac`. docs/metal_on_linux.md"""
