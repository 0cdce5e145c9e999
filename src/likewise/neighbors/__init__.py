"""Who is described like whom, and who is shown with whom."""
