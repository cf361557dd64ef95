"""`make evidence`: every number the README claims, measured. Start at run.py."""
