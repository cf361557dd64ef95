"""The mathematics: pure functions of tensors. No files, no models, no printing."""
