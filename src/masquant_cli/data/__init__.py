"""Rows of any Hugging Face dataset as chat samples, and chat samples as model inputs."""
