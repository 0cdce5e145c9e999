"""Pre-training methods: one `Method` subclass each, with its options."""
