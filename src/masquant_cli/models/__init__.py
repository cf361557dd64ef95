"""Knowing models: which families, where their linears sit, which token is of which modality."""
