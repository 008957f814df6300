"""The presentation of results: tables, levels, plots."""
