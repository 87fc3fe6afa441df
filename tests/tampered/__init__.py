"""A folder of tampered stores: what was done to each, and what a reader must answer (`cases.py`, `make.py`)."""
