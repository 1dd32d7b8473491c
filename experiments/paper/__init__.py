"""The paper's tables and figures: their cells, the search over learning rates, the reports."""
