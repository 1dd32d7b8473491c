"""Makes the tables and figures of the study from its rows."""
