"""What a GPU machine needs beside the benchmarks: one command for everything, tile sizes, phases, kernel resources."""
