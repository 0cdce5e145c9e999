"""Sets to evaluate on: labelled, captioned, with boxes or masks, one's own or well known."""
