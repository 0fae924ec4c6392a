"""The offline report: one self-contained HTML file about a line of runs, or runs compared."""
