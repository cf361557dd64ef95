"""One stage per file: load, call algo, save."""
