"""How good edits are (Sec. 4.1 of the paper): `metrics.py`."""
