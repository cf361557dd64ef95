"""The command line: `app.py` declares the commands, everything it imports is lazy."""
