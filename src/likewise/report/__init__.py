"""Pages and pictures, made from result files only."""
