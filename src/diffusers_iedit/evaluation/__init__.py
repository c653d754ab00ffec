"""How good edits are (Sec. 4): `runner.evaluate` edits, measures and reports; `methods.Method` is one way to edit."""
