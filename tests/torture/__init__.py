"""What devices live through, done to the installed command on purpose, thousands of times, with figures.

``make torture`` runs all of it and prints a table; ``make test`` runs a sample. Each module makes one
kind of misfortune. A *case* is one misfortune at one point: it begins with a known state of disk and server, and ends
with a list of what went wrong; an empty list means that the device survived. What "went wrong" means is written down
in ``fleet.py``, once for all of them, and knows nothing of how the program works inside.
"""
