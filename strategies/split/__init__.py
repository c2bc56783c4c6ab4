"""The pure parts of split learning, and the server's half of it."""
