"""HTML reports, tables and plots, from result files only."""
