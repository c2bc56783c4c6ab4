"""The only message schema: instructions to clients, reports from them, and the two ways they travel."""
