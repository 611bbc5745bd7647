"""Tools for a machine with a GPU: one command for everything, tile sizes, phases, resources of the kernels."""
