"""Maps as colors and figures."""
