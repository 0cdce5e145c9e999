"""The command line: one verb a stage. Parse, call, print; everything else lies below."""
