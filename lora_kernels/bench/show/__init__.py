"""How results look: tables, levels, plots."""
